"""Grouped matrix product: rows sorted by group, each group by a matrix of its own. What dropless experts are made of.

    out[s] = x[s] @ w[group of s]        dx[s] = dout[s] @ w[group of s]^T        dw[e] = sum of x[s]^T dout[s] in e

Three products and no other: `jax.lax.ragged_dot` costs E times as much on CPU, its weight gradient 8 times on TPU, and
on GPU it is lowered densely. The lowering is chosen by the platform compiled for, which need not be the one at hand:

    tpu       megablox, the Pallas kernel that comes with JAX
    others    blocks of rows that lie within one group, in loops whose trip counts are traced
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Rows of a block: a group is cut into as many of the first length as fit, then of the next; the last may overhang.
# Long ones amortise reading the weights, short ones waste fewer rows.
BLOCK_ROWS = (512, 128, 64)
TPU_TILE = (512, 1024, 1024)  # rows, contracted, out


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
  """x[s] @ w[e] for each row s of group e; rows of no group give 0 and have a gradient of 0.

  Args:
    x: [S, D], the rows of group 0 first, then those of group 1, ...; those after the last group are of none.
    w: [E, D, F], in the dtype of x.
    group_sizes: [E] int32, their sum at most S. A group may be empty.

  Returns:
    [S, F] in the dtype of x, accumulated in float32.
  """
  return _grouped_matmul(*map(jnp.asarray, (x, w, group_sizes)))


def grouped_matmul_dense(x: Array, w: Array, group_sizes: Array) -> Array:
  """The oracle of `grouped_matmul`, E times the work: every matrix on every row, and the right one picked."""
  return jnp.einsum("sd,edf,se->sf", x, w, membership(group_sizes, x.shape[0], x.dtype), precision="highest")


def membership(group_sizes: Array, rows: int, dtype: Any) -> Array:
  """[S, E]: 1 where row s is of group e."""
  ends = jnp.cumsum(group_sizes)
  s = jnp.arange(rows)[:, None]
  return ((s >= ends - group_sizes) & (s < ends)).astype(dtype)


@jax.custom_vjp
def _grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
  return _product(x, w, group_sizes, transposed=False)


def _forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple]:
  return _grouped_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(saved: tuple, dout: Array) -> tuple[Array, Array, None]:
  x, w, group_sizes = saved
  return _product(dout, w, group_sizes, transposed=True), _outer(x, dout, group_sizes), None


_grouped_matmul.defvjp(_forward, _backward)


def _product(x: Array, w: Array, group_sizes: Array, transposed: bool) -> Array:
  """x[s] @ w[e], or x[s] @ w[e]^T."""
  return lax.platform_dependent(
    x,
    w,
    group_sizes,
    tpu=functools.partial(tpu_product, transposed=transposed),
    default=functools.partial(block_product, transposed=transposed),
  )


def _outer(x: Array, dout: Array, group_sizes: Array) -> Array:
  """[E, D, F]: x[s]^T dout[s] summed over the rows of each group."""
  return lax.platform_dependent(x, dout, group_sizes, tpu=tpu_outer, default=block_outer)


def _over_blocks(body: Callable, carry: Any, start: Array, size: Array, rows: int) -> Any:
  """Folds body(carry, first, length, inside) over blocks of rows [first, first + length) that cover one group.

  Args:
    body: `length` is static, `inside` [length, 1] bool says which of the rows are of the group, None all of them.
    carry: initial value.
    start: [] int32, first row of the group.
    size: [] int32, its rows.
    rows: of the whole array, S; a block that would go beyond it begins earlier.
  """
  end = start + size
  *lengths, last = [length for length in BLOCK_ROWS if length <= rows] or [rows]
  for length in lengths:
    blocks = (end - start) // length
    carry = lax.fori_loop(0, blocks, lambda i, c, at=start, n=length: body(c, at + i * n, n, None), carry)
    start += blocks * length

  def overhanging(i: Array, carry: Any) -> Any:
    begin = start + i * last
    first = jnp.minimum(begin, rows - last)
    s = first + jnp.arange(last)[:, None]
    return body(carry, first, last, (s >= begin) & (s < end))

  return lax.fori_loop(0, -(-(end - start) // last), overhanging, carry)


def block_product(x: Array, w: Array, group_sizes: Array, transposed: bool) -> Array:
  """`_product`, by blocks."""
  rows = x.shape[0]
  starts = jnp.cumsum(group_sizes) - group_sizes
  contracted = (((1,), (1 if transposed else 0,)), ((), ()))
  width = w.shape[1 if transposed else 2]

  def group(e: Array, out: Array) -> Array:
    matrix = w[e]

    def block(out: Array, first: Array, length: int, inside: Array | None) -> Array:
      part = lax.dynamic_slice_in_dim(x, first, length)
      part = lax.dot_general(part, matrix, contracted, preferred_element_type=jnp.float32).astype(x.dtype)
      if inside is not None:  # the other rows are of a group that was or will be written
        part = jnp.where(inside, part, lax.dynamic_slice_in_dim(out, first, length))
      return lax.dynamic_update_slice_in_dim(out, part, first, 0)

    return _over_blocks(block, out, starts[e], group_sizes[e], rows)

  out = jnp.zeros((rows, width), x.dtype)
  return lax.fori_loop(0, w.shape[0], group, out) if rows else out


def block_outer(x: Array, dout: Array, group_sizes: Array) -> Array:
  """`_outer`, by blocks; accumulated in float32, group by group."""
  rows = x.shape[0]
  starts = jnp.cumsum(group_sizes) - group_sizes

  def group(_, where: tuple[Array, Array]) -> tuple[None, Array]:
    def block(total: Array, first: Array, length: int, inside: Array | None) -> Array:
      left, right = (lax.dynamic_slice_in_dim(a, first, length) for a in (x, dout))
      if inside is not None:
        left, right = jnp.where(inside, left, 0), jnp.where(inside, right, 0)
      return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    total = jnp.zeros((x.shape[1], dout.shape[1]), jnp.float32)
    return None, _over_blocks(block, total, *where, rows).astype(x.dtype)

  if not rows:
    return jnp.zeros((group_sizes.shape[0], x.shape[1], dout.shape[1]), x.dtype)
  return lax.scan(group, None, (starts, group_sizes))[1]


def tpu_product(x: Array, w: Array, group_sizes: Array, transposed: bool, interpret: bool = False) -> Array:
  """`_product`, by megablox; `interpret` runs it anywhere, slowly."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  if not x.shape[0]:
    return jnp.zeros((0, w.shape[1 if transposed else 2]), x.dtype)
  padded = _pad_to_tiles(x)
  tiles = _tiles(padded.shape[0], *(w.shape[:0:-1] if transposed else w.shape[1:]))
  out = gmm(padded, w, group_sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)
  # the kernel leaves rows of no group as they were in memory
  return jnp.where(_of_a_group(x, group_sizes), out[: x.shape[0]], 0)


def tpu_outer(x: Array, dout: Array, group_sizes: Array, interpret: bool = False) -> Array:
  """`_outer`, by megablox."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  if not x.shape[0]:
    return jnp.zeros((group_sizes.shape[0], x.shape[1], dout.shape[1]), x.dtype)
  left, right = _pad_to_tiles(x), _pad_to_tiles(dout)
  tiles = _tiles(left.shape[0], x.shape[1], dout.shape[1])
  return tgmm(left.T, right, group_sizes, x.dtype, tiles, interpret=interpret)


def _pad_to_tiles(x: Array) -> Array:
  tile = min(TPU_TILE[0], -(-x.shape[0] // 128) * 128)
  return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))


def _tiles(rows: int, contracted: int, width: int) -> tuple[int, int, int]:
  return tuple(map(min, TPU_TILE, (rows, contracted, width)))


def _of_a_group(x: Array, group_sizes: Array) -> Array:
  return (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
