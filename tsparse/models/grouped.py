"""Grouped matrix product: rows sorted by group, each group by a matrix of its own. What dropless experts are made of.

    out[s] = x[s] @ w[group of s]        dx[s] = dout[s] @ w[group of s]^T        dw[e] = sum of x[s]^T dout[s] in e

Three products and no other: `jax.lax.ragged_dot` costs E times as much on CPU, its weight gradient 8 times on TPU, and
on GPU it is lowered densely. The lowering is chosen by the platform compiled for, which need not be the one at hand:

    tpu       megablox, the Pallas kernel that comes with JAX
    cpu       float32: our own products (native/grouped.cc), which read and write rows where they are
    others    blocks of rows that lie within one group, in loops whose trip counts are traced; on CPU too for bfloat16
              and where there is no C++ compiler
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsparse.native import grouped as native
from tsparse.native.library import usable

Array = jax.Array

# Rows of a block: a group is cut into as many of the longest as fit, and the shortest that covers the rest. Products
# of long blocks are faster, and the others waste fewer rows.
BLOCK_ROWS = (64, 128, 192, 256, 384, 512, 640, 768)
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
  return grouped_matmuls(x, (w,), group_sizes)[0]


def grouped_matmuls(x: Array, ws: Sequence[Array], group_sizes: Array) -> tuple[Array, ...]:
  """`grouped_matmul` by each w, all of one shape, at once: blocks read x, and add up its gradient, only once."""
  return _grouped_matmuls(jnp.asarray(x), tuple(map(jnp.asarray, ws)), jnp.asarray(group_sizes))


def grouped_matmul_dense(x: Array, w: Array, group_sizes: Array) -> Array:
  """The oracle of `grouped_matmul`, E times the work: every matrix on every row, and the right one picked."""
  return jnp.einsum("sd,edf,se->sf", x, w, membership(group_sizes, x.shape[0], x.dtype), precision="highest")


def membership(group_sizes: Array, rows: int, dtype: Any) -> Array:
  """[S, E]: 1 where row s is of group e."""
  ends = jnp.cumsum(group_sizes)
  s = jnp.arange(rows)[:, None]
  return ((s >= ends - group_sizes) & (s < ends)).astype(dtype)


@jax.custom_vjp
def _grouped_matmuls(x: Array, ws: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  return lax.platform_dependent(x, ws, group_sizes, tpu=tpu_products, cpu=cpu_products, default=block_products)


def _forward(*args: Any) -> tuple[tuple[Array, ...], tuple]:
  return _grouped_matmuls(*args), args


def _backward(saved: tuple, douts: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...], None]:
  x, ws, group_sizes = saved
  dx = lax.platform_dependent(douts, ws, group_sizes, tpu=tpu_transposed, cpu=cpu_transposed, default=block_transposed)
  dws = lax.platform_dependent(x, douts, group_sizes, tpu=tpu_outers, cpu=cpu_outers, default=block_outers)
  return dx, dws, None


_grouped_matmuls.defvjp(_forward, _backward)


class Block(NamedTuple):
  """Rows [first, first + length) of all, of which `inside` [length, 1] bool are of the group; None: all of them."""

  first: Array  # [] int32
  length: int
  inside: Array | None

  def of(self, rows: Array) -> Array:
    """Its rows of [S, n]."""
    return lax.dynamic_slice_in_dim(rows, self.first, self.length)

  def within(self, rows: Array) -> Array:
    """Its rows of [S, n], 0 where they are of another group."""
    return self.of(rows) if self.inside is None else jnp.where(self.inside, self.of(rows), 0)

  def write(self, rows: Array, part: Array) -> Array:
    """[S, n] with `part` [length, n] in those of its rows that are of the group; others' were or will be written."""
    part = part.astype(rows.dtype)
    part = part if self.inside is None else jnp.where(self.inside, part, self.of(rows))
    return lax.dynamic_update_slice_in_dim(rows, part, self.first, 0)


def _over_blocks(body: Callable, carry: Any, start: Array, size: Array, rows: int) -> Any:
  """Folds body(carry, block) over blocks that cover one group.

  Args:
    body: what is done with a Block.
    carry: initial value.
    start: [] int32, first row of the group.
    size: [] int32, its rows.
    rows: of the whole array, S; a block that would go beyond it begins earlier.
  """
  lengths = [length for length in BLOCK_ROWS if length < rows] or [rows]
  longest, end = lengths[-1], start + size
  carry = lax.fori_loop(0, size // longest, lambda i, c: body(c, Block(start + i * longest, longest, None)), carry)
  begin = start + size // longest * longest
  for shorter, length in zip([0, *lengths[:-1]], lengths, strict=True):

    def remainder(i: Array, carry: Any, length: int = length) -> Any:
      # i is 0, and XLA does not know it: it would multiply before the loop, whether there is a turn or none
      first = jnp.minimum(begin + i, rows - length)
      s = first + jnp.arange(length)[:, None]
      return body(carry, Block(first, length, (s >= begin) & (s < end)))

    # a loop of one turn or none: a condition would copy what it carries
    fits = (end - begin > shorter) & (end - begin <= length)
    carry = lax.fori_loop(0, fits.astype(jnp.int32), remainder, carry)
  return carry


def block_products(x: Array, ws: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  """x[s] @ w[e] for each w, by blocks."""

  def product(outs: tuple[Array, ...], block: Block, matrices: list[Array]) -> tuple[Array, ...]:
    part = block.of(x)
    return tuple(block.write(out, _dot(part, 1, matrix, 0)) for out, matrix in zip(outs, matrices, strict=True))

  return _fold(product, tuple(jnp.zeros((x.shape[0], w.shape[2]), x.dtype) for w in ws), ws, group_sizes)


def block_transposed(douts: tuple[Array, ...], ws: tuple[Array, ...], group_sizes: Array) -> Array:
  """dout[s] @ w[e]^T, summed over the pairs of the two, by blocks."""

  def product(dx: Array, block: Block, matrices: list[Array]) -> Array:
    pairs = zip(douts, matrices, strict=True)
    return block.write(dx, sum(_dot(block.of(dout), 1, matrix, 1) for dout, matrix in pairs))

  return _fold(product, jnp.zeros((douts[0].shape[0], ws[0].shape[1]), douts[0].dtype), ws, group_sizes)


def _fold(product: Callable, out: Any, ws: tuple[Array, ...], group_sizes: Array) -> Any:
  """Folds product(out, block, matrices of its group) over the blocks of all groups; `out` is of arrays [S, n]."""
  rows, starts = jax.tree.leaves(out)[0].shape[0], jnp.cumsum(group_sizes) - group_sizes

  def group(e: Array, out: Any) -> Any:
    matrices = [w[e] for w in ws]
    return _over_blocks(lambda out, block: product(out, block, matrices), out, starts[e], group_sizes[e], rows)

  return lax.fori_loop(0, group_sizes.shape[0], group, out) if rows else out


def block_outers(x: Array, douts: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  """x[s]^T dout[s] summed over the rows of each group, [E, D, F] for each dout; in float32, group by group."""
  rows, widths = x.shape[0], [(x.shape[1], dout.shape[1]) for dout in douts]
  if not rows:
    return tuple(jnp.zeros((group_sizes.shape[0], *width), x.dtype) for width in widths)

  def product(totals: list[Array], block: Block) -> list[Array]:
    left, *rights = (block.within(array) for array in (x, *douts))
    return [total + _dot(left, 0, right, 0) for total, right in zip(totals, rights, strict=True)]

  def group(_, where: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
    totals = _over_blocks(product, [jnp.zeros(width, jnp.float32) for width in widths], *where, rows)
    return None, tuple(total.astype(x.dtype) for total in totals)

  return lax.scan(group, None, (jnp.cumsum(group_sizes) - group_sizes, group_sizes))[1]


def _dot(left: Array, of_left: int, right: Array, of_right: int) -> Array:
  """The product of two matrices over one axis of each, in float32."""
  return lax.dot_general(left, right, (((of_left,), (of_right,)), ((), ())), preferred_element_type=jnp.float32)


def cpu_products(x: Array, ws: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  """`block_products`, natively where that can be."""
  return (native.products if usable(x) else block_products)(x, ws, group_sizes)


def cpu_transposed(douts: tuple[Array, ...], ws: tuple[Array, ...], group_sizes: Array) -> Array:
  """`block_transposed`, natively where that can be."""
  return (native.transposed if usable(douts[0]) else block_transposed)(douts, ws, group_sizes)


def cpu_outers(x: Array, douts: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  """`block_outers`, natively where that can be."""
  return (native.outers if usable(x) else block_outers)(x, douts, group_sizes)


def tpu_products(x: Array, ws: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  """`block_products`, by megablox."""
  return tuple(tpu_product(x, w, group_sizes, transposed=False) for w in ws)


def tpu_transposed(douts: tuple[Array, ...], ws: tuple[Array, ...], group_sizes: Array) -> Array:
  """`block_transposed`, by megablox."""
  return sum(tpu_product(dout, w, group_sizes, transposed=True) for dout, w in zip(douts, ws, strict=True))


def tpu_outers(x: Array, douts: tuple[Array, ...], group_sizes: Array) -> tuple[Array, ...]:
  """`block_outers`, by megablox."""
  return tuple(tpu_outer(x, dout, group_sizes) for dout in douts)


def tpu_product(x: Array, w: Array, group_sizes: Array, transposed: bool, interpret: bool = False) -> Array:
  """x[s] @ w[e], or x[s] @ w[e]^T, by megablox; `interpret` runs it anywhere, slowly."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  if not x.shape[0]:
    return jnp.zeros((0, w.shape[1 if transposed else 2]), x.dtype)
  padded = _pad_to_tiles(x)
  tiles = _tiles(padded.shape[0], *(w.shape[:0:-1] if transposed else w.shape[1:]))
  out = gmm(padded, w, group_sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)
  # the kernel leaves rows of no group as they were in memory
  return jnp.where(_of_a_group(x, group_sizes), out[: x.shape[0]], 0)


def tpu_outer(x: Array, dout: Array, group_sizes: Array, interpret: bool = False) -> Array:
  """x[s]^T dout[s] summed over the rows of each group, [E, D, F], by megablox."""
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
