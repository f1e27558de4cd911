"""Causal grouped-query attention within the segments of packed rows: one function, one lowering for each platform.

    out[t] = sum over s of softmax_s(softcap(query[t] . key[s] / sqrt(scalar))) value[s]
             over s <= t of the segment of t, with t - s < window

The lowering is chosen by the platform compiled for, which need not be the one at hand:

    tpu       splash attention, the Pallas kernel that comes with JAX: blocks of scores live in VMEM only, those above
              the diagonal or out of the window are skipped, and the backward pass computes them again
    cuda      as others, and by `config.model.attention_impl` "triton" the Pallas flash kernel that comes with JAX, for
              16-bit models without softcap and with no window shorter than the row: it has never run on a GPU. cuDNN's,
              which jax.nn.dot_product_attention reaches, is said to be faster, but takes segments only as a mask
              [B, 1, T, T] and cannot even be traced, let alone tested, where cuDNN is not installed
    cpu       blocks of queries, each against the keys that it may see at all: half of the scores, less with a window;
              by native/attention.cc for float32 models without softcap where there is a C++ compiler, else by XLA
    others    the scores [B, N, T, T], by XLA: the oracle, and the fallback of the first two

On a mesh a kernel runs on each device's rows and heads. Where rows or heads do not divide (the single row of
initialisation) the fallback runs. Rows are padded to whole blocks (a query of padding sees padding before it: finite
numbers that nobody reads), and head_dim may be any number.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsparse import sharding
from tsparse.models.layers import softcap
from tsparse.native import attention as native
from tsparse.native.library import usable

Array = jax.Array

TPU_BLOCK = 512  # queries and keys of a block of splash attention, forward and backward; 128 is the least
CUDA_BLOCK = 128  # of the Triton kernel, forward, which is the default there
CPU_BLOCK, CPU_BLOCKS = 32, 4  # queries of a block at least, and blocks at most: products of few rows are slow
IMPLEMENTATIONS = ("auto", "triton")  # of config.model.attention_impl: what was measured, or Triton's kernel on GPUs


class Rule(NamedTuple):
  """What of attention is known when it is traced."""

  window: int  # 0 where it would hide nothing
  scale: float  # of the scores
  cap: float  # of the scaled scores, 0 for none
  impl: str = "auto"  # one of IMPLEMENTATIONS


def attention(
  query: Array,
  key: Array,
  value: Array,
  segment_ids: Array,
  window: int = 0,
  scalar: int = 0,
  cap: float = 0.0,
  impl: str = "auto",
) -> Array:
  """softmax(softcap(q k^T / sqrt(scalar))) v over what each query may see; scores and softmax in float32.

  The backward pass keeps the arguments and computes the scores again.

  Args:
    query: [B, T, N, H].
    key: [B, T, K, H]; N is a multiple of K, query head n uses kv head n // (N/K).
    value: [B, T, K, H].
    segment_ids: [B, T] int32; packed documents have different ids, padding has 0.
    window: a query sees itself and the window - 1 positions before it; 0 means all before it.
    scalar: 0 means H.
    cap: scores become cap tanh(scores / cap); 0 means they stay.
    impl: one of IMPLEMENTATIONS.

  Returns:
    [B, T, N, H] in the dtype of `query`.
  """
  rule = make_rule(query.shape[1], query.shape[-1], window, scalar, cap, impl)
  return _attention(rule, query, key, value, segment_ids)


def make_rule(time: int, head_dim: int, window: int, scalar: int, cap: float, impl: str = "auto") -> Rule:
  """The rule for rows of `time` tokens. Arguments are those of `attention`."""
  return Rule(window if window < time else 0, (scalar or head_dim) ** -0.5, cap, impl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule: Rule, *args: Array) -> Array:
  return _by_platform(rule, lambda lowering: lowering, *args)


def _forward(rule: Rule, *args: Array) -> tuple[Array, tuple[Array, ...]]:
  # differentiated as in the backward pass, so that where that is preceded by this again (remat) XLA finds one kernel
  return _by_platform(rule, _differentiated, *args), args


def _backward(rule: Rule, saved: tuple[Array, ...], dout: Array) -> tuple[Array, Array, Array, None]:
  return *_by_platform(rule, _gradient, *saved, dout), None


_attention.defvjp(_forward, _backward)


def _differentiated(lowering: Callable) -> Callable:
  return lambda *qkv_ids: jax.vjp(lowering, *qkv_ids)[0]


def _gradient(lowering: Callable) -> Callable:
  """(query, key, value, segment_ids, dout) -> dquery, dkey, dvalue."""

  def gradient(query: Array, key: Array, value: Array, segment_ids: Array, dout: Array) -> tuple[Array, Array, Array]:
    return jax.vjp(lambda *qkv: lowering(*qkv, segment_ids), query, key, value)[1](dout)

  return gradient


def _by_platform(rule: Rule, make: Callable, query: Array, key: Array, *others: Array) -> Array | tuple[Array, ...]:
  """make(lowering)(query, key, *others) by the lowering of the platform compiled for."""
  by_xla = make(functools.partial(xla_attention, rule))
  by_kernel = {
    platform: _per_device(make(functools.partial(kernel, rule)))
    for platform, kernel in {"tpu": tpu_attention, "cuda": cuda_attention}.items()
    if has_kernel(platform, rule, query.dtype) and _splits(query, key)
  }
  if not rule.cap and _splits(query, key) and usable(query):
    by_blocks = _per_device(make(functools.partial(native_attention, rule)))
  else:
    by_blocks = make(functools.partial(cpu_attention, rule))
  return lax.platform_dependent(query, key, *others, **by_kernel, cpu=by_blocks, default=by_xla)


def has_kernel(platform: str, rule: Rule, dtype: Any) -> bool:
  """Whether `platform` (tpu, cuda, cpu) has a kernel that holds no scores; `dtype` is that of the queries."""
  if platform == "cuda":
    return rule.impl == "triton" and not rule.window and not rule.cap and jnp.dtype(dtype).itemsize == 2
  return platform == "tpu"


def _splits(query: Array, key: Array) -> bool:
  """Whether rows and heads divide over the mesh, if one is set."""
  mesh = jax.sharding.get_abstract_mesh()
  lengths = {"B": query.shape[0], "N": query.shape[2], "K": key.shape[2]}
  return mesh.empty or not any(length % sharding.shard_count(mesh, letter) for letter, length in lengths.items())


def _per_device(kernel: Callable) -> Callable:
  """`kernel` on the rows and heads of each device: XLA cannot split a Pallas call by itself."""
  if jax.sharding.get_abstract_mesh().empty:
    return kernel
  heads, rows = sharding.spec("BTNH"), sharding.spec("BT")

  def sharded(*args: Array) -> Array | tuple[Array, ...]:
    specs = tuple(heads if array.ndim == 4 else rows for array in args)
    return jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)(*args)

  return sharded


def xla_attention(rule: Rule, query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
  """`attention` with all scores, those that are masked too."""
  batch, time, heads, head_dim = query.shape
  t = jnp.arange(time)
  distance = t[:, None] - t[None, :]  # [T, T]
  near = (distance >= 0) & (distance < rule.window) if rule.window else distance >= 0
  mask = near & (segment_ids[:, :, None] == segment_ids[:, None, :])  # [B, T, T]
  grouped = query.reshape(batch, time, key.shape[2], -1, head_dim)  # [B, T, K, N/K, H]
  scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
  scores = softcap(scores * rule.scale, rule.cap)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, time, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cpu_attention(rule: Rule, query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
  """`attention` by blocks of queries."""
  rows, key, value = _blocks(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
  outs = []
  for block, part, mask in _visible(rule, rows, segment_ids):
    weights = _weights(rule, mask, _scores(block, key[:, :, part])).astype(query.dtype)
    outs.append(jnp.einsum("bkrs,bksh->bkrh", weights, value[:, :, part]))
  return _unblocked(outs, query.shape)


def _cpu_backward(rule: Rule, saved: tuple[Array, ...], dout: Array) -> tuple[Array, Array, Array, None]:
  """The products of JAX's own gradient, those of keys and values the way round that XLA's products are fast."""
  query, key, value, segment_ids = saved
  rows, douts = _blocks(query, key.shape[2]), _blocks(dout, key.shape[2])
  key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, K, T, H]
  dquery = []
  dkey = dvalue = jnp.zeros(key.swapaxes(2, 3).shape, jnp.float32)  # [B, K, H, T]
  for (block, part, mask), dblock in zip(_visible(rule, rows, segment_ids), douts, strict=True):
    weights, backward = jax.vjp(functools.partial(_weights, rule, mask), _scores(block, key[:, :, part]))
    (dscores,) = backward(_scores(dblock, value[:, :, part]))
    weights, dscores = weights.astype(query.dtype), dscores.astype(query.dtype)
    dquery.append(jnp.einsum("bkrs,bksh->bkrh", dscores, key[:, :, part]))
    dkey = _added(dkey, part, block, dscores)
    dvalue = _added(dvalue, part, dblock, weights)
  dkey, dvalue = (total.transpose(0, 3, 1, 2).astype(query.dtype) for total in (dkey, dvalue))
  return _unblocked(dquery, query.shape), dkey, dvalue, None


def _added(total: Array, part: slice, rows: Array, scores: Array) -> Array:
  """rows^T scores [B, K, H, s] added to the `part` of total [B, K, H, T] that they belong to.

  The rows are transposed beforehand, and the barrier keeps XLA from undoing that: its product for CPUs is up to 1.5
  times as fast that way, and scores^T rows would take 3 times as long.
  """
  transposed = lax.optimization_barrier(rows.swapaxes(2, 3))
  product = jnp.einsum("bkhr,bkrs->bkhs", transposed, scores, preferred_element_type=jnp.float32)
  return lax.dynamic_update_slice_in_dim(total, total[..., part] + product, part.start, axis=3)


cpu_attention.defvjp(lambda rule, *args: (cpu_attention(rule, *args), args), _cpu_backward)


def _block_size(time: int) -> int:
  return min(max(CPU_BLOCK, -(-time // CPU_BLOCKS)), time)


def _blocks(query: Array, kv_heads: int) -> Array:
  """[B, T, N, H] -> blocks of t tokens as CPUs multiply matrices, heads first, [T/t, B, K, N/K t, H]; T padded."""
  batch, time, heads, head_dim = query.shape
  size = _block_size(time)
  query = _padded(query, size).reshape(batch, -1, size, kv_heads, heads // kv_heads, head_dim)
  return query.transpose(1, 0, 3, 4, 2, 5).reshape(-1, batch, kv_heads, heads // kv_heads * size, head_dim)


def _unblocked(blocks: list[Array], shape: tuple[int, ...]) -> Array:
  """`_blocks`' way back to [B, T, N, H], which is `shape`."""
  batch, kv_heads, rows, head_dim = blocks[0].shape
  out = jnp.stack(blocks).reshape(-1, batch, kv_heads, shape[2] // kv_heads, rows * kv_heads // shape[2], head_dim)
  return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, *shape[2:])[:, : shape[1]]


def _visible(rule: Rule, rows: Array, segment_ids: Array) -> Iterator[tuple[Array, slice, Array]]:
  """For each of `_blocks`: itself, which keys it may see at all, and which of them each query sees, [B, 1, 1, t, s]."""
  time = segment_ids.shape[1]
  size = _block_size(time)
  ids = _padded(segment_ids, size)
  for first, block in zip(range(0, time, size), rows, strict=True):
    part = slice(max(0, first - rule.window + 1) if rule.window else 0, min(first + size, time))
    distance = jnp.arange(first, first + size)[:, None] - jnp.arange(part.start, part.stop)  # [t, s]
    near = (distance >= 0) & (distance < rule.window) if rule.window else distance >= 0
    yield block, part, (near & (ids[:, first : first + size, None] == segment_ids[:, None, part]))[:, None, None]


def _scores(rows: Array, keys: Array) -> Array:
  return jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32)


def _weights(rule: Rule, mask: Array, scores: Array) -> Array:
  """softmax of products of queries and keys [B, K, N/K t, s], float32, where mask [B, 1, 1, t, s]."""
  grouped = softcap(scores * rule.scale, rule.cap).reshape(*scores.shape[:2], -1, *mask.shape[-2:])
  return jax.nn.softmax(jnp.where(mask, grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def native_attention(rule: Rule, query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
  """`attention` by native code, which knows no softcap."""
  return native.forward(rule.scale, rule.window, query, key, value, segment_ids)


native_attention.defvjp(
  lambda rule, *args: (native_attention(rule, *args), args),
  lambda rule, args, dout: (*native.backward(rule.scale, rule.window, *args, dout), None),
)


def tpu_attention(
  rule: Rule, query: Array, key: Array, value: Array, segment_ids: Array, interpret: bool = False
) -> Array:
  """`attention` by splash attention; `interpret` runs it anywhere, slowly.

  The kernel knows no scale: queries are multiplied by it beforehand, and rounded to their dtype.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  time, heads = query.shape[1:3]
  block = tpu_block(time)
  query = (query.astype(jnp.float32) * rule.scale).astype(query.dtype)
  query, key, value, segment_ids = (_padded(array, block) for array in (query, key, value, segment_ids))
  shape = (query.shape[1],) * 2
  mask = masks.LocalMask(shape, (rule.window - 1, 0), 0) if rule.window else masks.CausalMask(shape)
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(*[block] * 8),
    attn_logits_soft_cap=rule.cap or None,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  ids = splash.SegmentIds(segment_ids, segment_ids)
  out = jax.vmap(kernel)(*(jnp.swapaxes(array, 1, 2) for array in (query, key, value)), ids)  # [B, N, T, H]
  return jnp.swapaxes(out, 1, 2)[:, :time]


def cuda_attention(
  rule: Rule, query: Array, key: Array, value: Array, segment_ids: Array, interpret: bool = False
) -> Array:
  """`attention` by Pallas' Triton kernel, which knows no windows, no softcap and no kv heads: they are repeated."""
  from jax.experimental.pallas.ops.gpu.attention import mha

  time, groups = query.shape[1], query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(array, groups, axis=2) for array in (key, value))
  args = (_padded(array, CUDA_BLOCK) for array in (query, key, value, segment_ids))
  return mha(*args, sm_scale=rule.scale, causal=True, interpret=interpret)[:, :time]


def tpu_block(time: int) -> int:
  """Queries, and keys, of a block of splash attention for rows of `time` tokens."""
  return min(TPU_BLOCK, -(-time // 128) * 128)


def tpu_share(time: int, window: int) -> float:
  """Scores that splash attention computes over T^2: all of each block where any is not masked, its padding included."""
  block = tpu_block(time)
  blocks = -(-time // block)
  nearest = [distance * block - block + 1 for distance in range(blocks)]  # of a query and a key of two blocks
  visited = sum(blocks - i for i, distance in enumerate(nearest) if not window or distance < window)
  return visited * (block / time) ** 2


def _padded(array: Array, block: int) -> Array:
  """Zeros behind the rows [B, T, ...] up to whole blocks: of segment 0, which no real query sees."""
  return jnp.pad(array, ((0, 0), (0, -array.shape[1] % block), *((0, 0),) * (array.ndim - 2)))
