"""The grouped product against its oracle: outputs and gradients, each lowering that can run here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tsparse import sharding
from tsparse.models.grouped import (
  block_outers,
  block_products,
  block_transposed,
  grouped_matmul,
  grouped_matmul_dense,
  grouped_matmuls,
  tpu_outer,
  tpu_product,
)
from tsparse.native import build, library
from tsparse.native import grouped as native

NATIVE = library.available()
SIZES = {  # S, rows of each group
  "balanced": (1200, (300, 300, 300, 300)),
  "skewed": (1301, (1, 1171, 33, 96)),
  "empty": (700, (0, 640, 0, 60)),
  "all in the last": (64, (0, 0, 0, 64)),
  "rows of no group": (900, (31, 0, 513, 129)),
  "no row of a group": (40, (0, 0, 0, 0)),
  "fewer rows than a block": (7, (2, 0, 4, 1)),
  "one row": (1, (0, 0, 1, 0)),
  "no rows": (0, (0, 0, 0, 0)),
} | {  # every length of a block, met exactly and by one row more or less
  f"{rows} between others": (rows + 6, (5, rows, 1))
  for rows in (*range(1, 12), 63, 64, 65, 191, 256, 257, 767, 768, 769, 1600)
}


def operands(rows, groups, dim=24, width=40, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = ((rows, dim), (groups, dim, width), (rows, width))
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def near(actual, expected):
  scale = np.abs(expected).max(initial=1e-30)
  np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


@pytest.fixture(params=["native", "blocks"], scope="module")
def lowering(request):
  """What CPUs multiply by: our products, or what they have without a compiler."""
  if request.param == "native" and not NATIVE:
    pytest.skip("no C++ compiler")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(library, "available", lambda: request.param == "native")
    jax.clear_caches()  # JAX would not ask again
    yield request.param
  jax.clear_caches()


@pytest.mark.parametrize("case", SIZES)
def test_outputs_and_gradients_are_the_oracles(case, lowering):
  rows, sizes = SIZES[case]
  x, w, dout = operands(rows, len(sizes))

  def outputs(product):
    out, gradient = jax.vjp(lambda x, w: product(x, w, jnp.array(sizes, jnp.int32)), x, w)
    return out, *gradient(dout)

  jax.tree.map(near, jax.jit(outputs, static_argnums=0)(grouped_matmul), outputs(grouped_matmul_dense))
  if sum(sizes) < rows:
    out, dx, _ = outputs(grouped_matmul)
    assert not out[sum(sizes) :].any() and not dx[sum(sizes) :].any()


def test_several_matrices_at_once_are_each_of_them_alone(lowering):
  rows, sizes = SIZES["rows of no group"]
  sizes = jnp.array(sizes, jnp.int32)
  x, first, dout = operands(rows, len(sizes))
  second = operands(rows, len(sizes), seed=1)[1]

  def outputs(products):
    outs, gradient = jax.vjp(products, x, (first, second))
    return outs, *gradient((dout, 2 * dout))

  def products(x, ws):
    return grouped_matmuls(x, ws, sizes)

  assert ("tsparse_grouped" in jax.jit(products).lower(x, (first, second)).as_text()) == (lowering == "native")
  at_once = outputs(products)
  alone = outputs(lambda x, ws: tuple(grouped_matmul_dense(x, w, sizes) for w in ws))
  jax.tree.map(near, at_once, alone)


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize("level", build.LEVELS)
@pytest.mark.parametrize("widths", [(24, 40), (37, 1), (700, 530), (3, 600)])
@pytest.mark.parametrize("case", ["skewed", "rows of no group"])
def test_native_products_by_each_instruction_set(case, widths, level):
  """Widths that are no multiple of a vector or of a tile, and such that are cut in pieces and parts."""
  rows, sizes = SIZES[case]
  (x, w, dout), sizes = operands(rows, len(sizes), *widths), jnp.array(sizes, jnp.int32)
  args = {
    "products": (block_products, x, (w, 2 * w), sizes),
    "transposed": (block_transposed, (dout, 2 * dout), (w, w), sizes),
    "outers": (block_outers, x, (dout, 2 * dout), sizes),
  }
  for name, (blocks, *of) in args.items():
    by_level = functools.partial(getattr(native, name), level=build.LEVELS[level])
    jax.tree.map(near, jax.jit(by_level)(*of), jax.jit(blocks)(*of))


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize("sizes", [(5, 3), (-1, 2), (2, 2, 2)])
def test_native_products_refuse_groups_that_are_not_those_of_rows_and_matrices(sizes):
  x, w, _ = operands(7, 2)
  with pytest.raises(jax.errors.JaxRuntimeError, match="groups are not those"):
    jax.block_until_ready(native.products(x, (w,), jnp.array(sizes, jnp.int32)))


@pytest.mark.parametrize("case", ["skewed", "empty", "rows of no group", "fewer rows than a block", "no rows"])
def test_the_kernel_for_tpu_interpreted_gives_the_same(case):
  rows, sizes = SIZES[case]
  x, w, dout = operands(rows, len(sizes), dim=128, width=256)
  sizes = jnp.array(sizes, jnp.int32)
  near(tpu_product(x, w, sizes, False, interpret=True), *block_products(x, (w,), sizes))
  near(tpu_product(dout, w, sizes, True, interpret=True), block_transposed((dout,), (w,), sizes))
  near(tpu_outer(x, dout, sizes, interpret=True), *block_outers(x, (dout,), sizes))


def test_each_platform_gets_its_lowering():
  """Compiling for a TPU needs none: the gradient is three kernels there, and none elsewhere in 16 bits."""
  x, w, _ = operands(1000, 4, dim=128, width=256)
  gradient = jax.jit(jax.grad(lambda x, w: grouped_matmul(x, w, jnp.array([0, 500, 100, 400])).sum(), argnums=(0, 1)))
  traced = gradient.trace(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
  kernels = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")
    for platform in ("tpu", "cuda", "cpu")
  }
  assert kernels == {"tpu": 2, "cuda": 0, "cpu": 0}  # the output itself is not needed


def test_bfloat16_is_accumulated_in_float32():
  x, w = jnp.ones((600, 24), jnp.bfloat16), jnp.ones((1, 24, 8), jnp.bfloat16)
  out, gradient = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array([600])), x, w)
  dx, dw = gradient(jnp.ones_like(out))
  assert out.dtype == dx.dtype == dw.dtype == jnp.bfloat16
  assert (out == 24).all() and (dx == 8).all() and (dw == 600).all()


def test_on_8_devices_each_multiplies_its_own_rows():
  """Rows and their groups differ between devices, the matrices are common: their gradients add up."""
  sizes = jnp.array([[50, 0, 14], [64, 0, 0], [0, 0, 0], [10, 20, 30], [1, 62, 1], [0, 64, 0], [5, 5, 5], [0, 0, 64]])
  x, w, dout = operands(8 * 64, 3)
  mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1, "expert": 1})

  @functools.partial(jax.shard_map, in_specs=(P("data"), P(), P("data")), out_specs=P("data"), check_vma=False)
  def sharded(x, w, sizes):
    return grouped_matmul(x, w, sizes[0])

  def looped(x, w, sizes):
    parts = zip(x.reshape(8, 64, -1), sizes, strict=True)
    return jnp.concatenate([grouped_matmul_dense(part, w, size) for part, size in parts])

  with jax.set_mesh(mesh):
    actual = jax.jit(jax.value_and_grad(lambda x, w: (sharded(x, w, sizes) * dout).sum(), argnums=(0, 1)))(x, w)
  expected = jax.value_and_grad(lambda x, w: (looped(x, w, sizes) * dout).sum(), argnums=(0, 1))(x, w)
  jax.tree.map(near, actual, expected)
