"""Attention against numpy, and each kernel against attention by XLA: outputs and gradients."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from tests.gpu import lowered_for_gpu
from tsparse import sharding
from tsparse.models import attention as attention_module
from tsparse.models.attention import (
  Rule,
  attention,
  cpu_attention,
  cuda_attention,
  native_attention,
  tpu_attention,
  xla_attention,
)
from tsparse.native import attention as native
from tsparse.native import build, library
from tsparse.train import topology

NEEDS_COMPILER = pytest.mark.skipif(not library.available(), reason="no C++ compiler")


def operands(time, heads, kv_heads, head_dim, rows=2, dtype=jnp.float32):
  """query, key, value, segment_ids, dout; documents end inside blocks, and so does the padding of the first row."""
  shapes = [(rows, time, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  keys = jax.random.split(jax.random.key(0), 4)
  query, key, value, dout = (jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True))
  segment_ids = np.full((rows, time), 2, np.int32)
  segment_ids[:, : time // 3] = 1
  segment_ids[0, time - time // 4 :] = 0
  return query, key, value, jnp.asarray(segment_ids), dout


def outputs(lowering, query, key, value, segment_ids, dout):
  out, gradient = jax.vjp(lambda *qkv: lowering(*qkv, segment_ids), query, key, value)
  return out, *gradient(dout)


def near(actual, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-6)


@pytest.mark.parametrize(("window", "scalar", "cap"), [(0, 0, 0.0), (3, 5, 0.0), (4, 0, 1.5)])
def test_a_query_sees_its_segment_its_window_and_nothing_after_it(window, scalar, cap):
  query, key, value, segment_ids, _ = map(np.asarray, operands(12, 4, 2, 6))
  expected = np.zeros_like(query)
  for b, t, n in np.ndindex(2, 12, 4):
    seen = [
      s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t] and (not window or t - s < window)
    ]  # fmt: skip
    scores = key[b, seen, n // 2] @ query[b, t, n] / np.sqrt(scalar or 6)
    scores = cap * np.tanh(scores / cap) if cap else scores
    weights = np.exp(scores - scores.max())
    expected[b, t, n] = weights / weights.sum() @ value[b, seen, n // 2]
  near(attention(query, key, value, segment_ids, window, scalar, cap), expected)


SHAPES = pytest.mark.parametrize(
  ("shape", "rule"),
  [
    ((200, 4, 2, 24), Rule(0, 0.2, 0.0)),  # documents cross blocks, head_dim no multiple of 128, rows no multiple of it
    ((300, 2, 1, 16), Rule(130, 0.3, 2.0)),  # a window longer than a block
    ((256, 1, 1, 128), Rule(20, 0.1, 0.0)),
  ],
)


@SHAPES
def test_blocks_of_queries_give_the_same(shape, rule):
  args = operands(*shape)
  blocks = jax.jit(functools.partial(outputs, functools.partial(cpu_attention, rule)))
  jax.tree.map(near, blocks(*args), outputs(functools.partial(xla_attention, rule), *args))


@NEEDS_COMPILER
@pytest.mark.parametrize("level", build.LEVELS)
@pytest.mark.parametrize(
  ("shape", "window"),
  [((200, 4, 2, 24), 0), ((300, 2, 1, 16), 130), ((49, 6, 2, 7), 3), ((1, 1, 1, 1), 0), ((97, 2, 2, 700), 0)],
)
def test_native_attention_by_each_instruction_set(shape, window, level):
  """Lengths that are no multiple of a block or of a vector; a head_dim above the depth of a panel."""
  *args, ids, dout = operands(*shape)
  level, scale = build.LEVELS[level], shape[3] ** -0.5
  expected = outputs(functools.partial(xla_attention, Rule(window, scale, 0.0)), *args, ids, dout)
  near(native.forward(scale, window, *args, ids, level=level), expected[0])
  jax.tree.map(near, tuple(native.backward(scale, window, *args, ids, dout, level=level)), expected[1:])


@NEEDS_COMPILER
def test_native_attention_sees_segments_in_any_order_and_never_hides_a_nan():
  query, key, value, _, dout = operands(160, 2, 1, 8)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 160)), jnp.int32)
  rule = Rule(0, 0.3, 0.0)
  expected = outputs(functools.partial(xla_attention, rule), query, key, value, ids, dout)
  jax.tree.map(near, outputs(functools.partial(native_attention, rule), query, key, value, ids, dout), expected)
  out = native.forward(0.3, 0, query, key.at[1, 100, 0, 0].set(jnp.nan), value, ids * 0)
  assert jnp.isnan(out[1, 100:]).all() and not jnp.isnan(out[1, :100]).any() and not jnp.isnan(out[0]).any()


@NEEDS_COMPILER
def test_native_attention_refuses_shapes_that_do_not_fit_together():
  query, key, value, ids, _ = operands(16, 4, 2, 8)
  for args in ((query[:, :, :3], key, value, ids), (query, key, value[:, :8], ids), (query, key, value, ids[:1])):
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit together"):
      jax.block_until_ready(native.forward(1.0, 0, *args))


@NEEDS_COMPILER
@pytest.mark.parametrize(("cap", "dtype", "expected"), [(0.0, "float32", 2), (2.0, "float32", 0), (0.0, "bfloat16", 0)])
def test_cpus_attend_natively_where_they_can(cap, dtype, expected):
  """Forward and backward are a call each, alone and on each device of a mesh, and give what one device gives."""
  args = operands(64, 4, 2, 16, rows=4, dtype=dtype)
  attend = jax.jit(functools.partial(outputs, functools.partial(attention, cap=cap)))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2, "expert": 2})
  with jax.set_mesh(mesh):
    assert attend.lower(*args).as_text().count("@tsparse_attention") == expected
    sharded = jax.device_get(attend(*args))
  assert attend.lower(*args).as_text().count("@tsparse_attention") == expected
  if expected:
    jax.tree.map(np.testing.assert_array_equal, sharded, jax.device_get(attend(*args)))


@SHAPES
def test_the_kernel_for_tpu_interpreted_gives_the_same(shape, rule, monkeypatch):
  monkeypatch.setattr(attention_module, "TPU_BLOCK", 128)
  args = operands(*shape)
  kernel = jax.jit(functools.partial(outputs, functools.partial(tpu_attention, rule, interpret=True)))
  jax.tree.map(near, kernel(*args), outputs(functools.partial(xla_attention, rule), *args))


def test_the_kernel_for_gpu_interpreted_gives_the_same():
  args, rule = operands(200, 4, 2, 24), Rule(0, 0.2, 0.0)
  kernel = jax.jit(functools.partial(outputs, functools.partial(cuda_attention, rule, interpret=True)))
  jax.tree.map(near, kernel(*args), outputs(functools.partial(xla_attention, rule), *args))


def test_the_gradient_computes_the_scores_again_and_is_the_same():
  args = operands(40, 4, 2, 8)
  actual = outputs(functools.partial(attention, window=7, cap=3.0), *args)
  jax.tree.map(near, actual, outputs(functools.partial(xla_attention, Rule(7, 8**-0.5, 3.0)), *args))


def test_on_8_devices_each_computes_its_rows_and_heads():
  args, rule = operands(64, 4, 2, 16, rows=4), Rule(9, 0.25, 0.0)
  expected = outputs(functools.partial(xla_attention, rule), *args)
  with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2, "expert": 2})):
    kernel = attention_module._per_device(functools.partial(tpu_attention, rule, interpret=True))
    jax.tree.map(near, jax.jit(functools.partial(outputs, kernel))(*args), expected)


@pytest.mark.parametrize(
  ("rows", "dtype", "window", "expected"),
  [
    (2, jnp.bfloat16, 0, {"tpu": 3, "cuda": 3, "cpu": 0}),  # the output itself is not needed
    (2, jnp.bfloat16, 50, {"tpu": 3, "cuda": 0, "cpu": 0}),
    (2, jnp.bfloat16, 500, {"tpu": 3, "cuda": 3, "cpu": 0}),  # longer than the row
    (2, jnp.float32, 0, {"tpu": 3, "cuda": 0, "cpu": 0}),
    (1, jnp.bfloat16, 0, {"tpu": 0, "cuda": 0, "cpu": 0}),  # one row on two devices
  ],
)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_each_platform_gets_its_lowering(rows, dtype, window, expected, impl):
  """Tracing and lowering for an accelerator need none, nor its libraries. On GPUs the kernel is used by name only."""
  expected = expected | ({"cuda": 0} if impl == "auto" else {})
  *args, _ = operands(256, 4, 2, 64, rows=rows, dtype=dtype)
  gradient = jax.jit(jax.grad(lambda *a: attention(*a, window, impl=impl).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:2])
  with jax.set_mesh(mesh):
    traced = gradient.trace(*args)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
  texts["cuda"] = lowered_for_gpu(gradient, *args, mesh=mesh.abstract_mesh)
  assert {name: text.count("tpu_custom_call") + text.count("triton") for name, text in texts.items()} == expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: requirements-tpu.txt")
@pytest.mark.parametrize("sharded", [False, True])
def test_libtpu_compiles_the_kernels(sharded):
  """What interpretation cannot tell: shapes and memory that the compiler for TPUs takes."""
  devices, _ = topology.devices("v5e:2x2")
  mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2, "expert": 1}, devices)
  *args, _ = operands(1000, 4, 2, 64, dtype=jnp.bfloat16)
  places = [
    NamedSharding(mesh, sharding.spec("BTNH"[: x.ndim])) if sharded else SingleDeviceSharding(devices[0]) for x in args
  ]
  args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(args, places, strict=True)]
  gradient = jax.jit(jax.grad(lambda *a: attention(*a, 300, 0, 30.0).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
  if sharded:
    with jax.set_mesh(mesh):
      compiled = gradient.lower(*args).compile()
  else:
    compiled = gradient.lower(*args).compile()
  text = compiled.as_text()
  assert text.count("tpu_custom_call") == 3 and "all-gather" not in text and "[2,2,2,1000,1000]" not in text
