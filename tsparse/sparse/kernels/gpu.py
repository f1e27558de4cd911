"""The kernels of decoding for CUDA GPUs, in Pallas by way of Triton; see gathered.py for what is listed and when.

Bytes of one FFN of Mistral's shape (D 4096, F 14336, bfloat16), of 352 MB dense, at 90 % zeros and a third of the gates
open: exact reads gate 117 + up 37 + down 12 = 166 MB, so 2.1 times less is the limit; predictor reads 35 MB of rows and
its predictor (46 MB at rank 1260): 4.3 times less. Lowered and compiled for CUDA, compared with jnp by interpretation,
and never run on a GPU: no speed is known.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tsparse.activations import Activation
from tsparse.sparse.kernels import gathered, reference
from tsparse.sparse.kernels.reference import Neurons, Predictor, attend, linear, place

__all__ = ["attend", "feed_forward", "linear", "place"]  # products and attention that read everything are XLA's

Array = jax.Array
ROWS, COLUMNS = 16, 256  # of a tile of weights
SPLITS = 16  # programs that share the rows of a sum: they are added up in their order, so that results do not vary


def feed_forward(
  mode: str,
  activation: Activation,
  x: Array,
  chosen: Array,
  weights: Array,
  neurons: Neurons,
  predictor: Predictor | None = None,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """See reference.feed_forward."""
  if mode == "off" or len(x) > gathered.MOST:
    return reference.feed_forward(mode, activation, x, chosen, weights, neurons, predictor)
  kernel = gathered.Rows(*(functools.partial(function, interpret=interpret) for function in (dot, add)))
  return gathered.feed_forward(kernel, mode, activation, x, chosen, weights, neurons, predictor, block=1)


def _call(kernel, grid: tuple[int, ...], shape: tuple[int, ...], interpret: bool, *args: Array) -> Array:
  return pl.pallas_call(
    kernel,
    grid=grid,
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
  )(*args)


def _single(rows: Array, count: Array, block: int) -> tuple[Array, Array]:
  """The list of blocks as one of rows: a gather of neighbours costs no more than a block."""
  return (rows[:, None] * block + jnp.arange(block)).reshape(-1), count * block


def _padded(rows: Array) -> Array:
  return jnp.pad(rows, (0, -len(rows) % ROWS)).astype(jnp.int32)


def dot(w: Array, rows: Array, count: Array, x: Array, block: int, interpret: bool = False) -> Array:
  """See gathered.Rows."""
  rows, count = _single(rows, count, block)
  (tokens, dim), length = x.shape, len(rows)

  def kernel(rows_ref, count_ref, w_ref, x_ref, out_ref):
    start = pl.program_id(0) * ROWS

    @pl.when(start < count_ref[0])
    def _():
      row = rows_ref[pl.ds(start, ROWS)]

      def tile(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        column = i * COLUMNS + jnp.arange(COLUMNS)
        inside = column < dim
        whole = jnp.broadcast_to(inside[None], (ROWS, COLUMNS))
        part = triton.load(w_ref.at[row[:, None], column[None]], mask=whole, other=0).astype(jnp.float32)
        vectors = (triton.load(x_ref.at[t, column], mask=inside, other=0) for t in range(tokens))
        return tuple(total + jnp.sum(part * vector[None], axis=1) for total, vector in zip(sums, vectors, strict=True))

      sums = jax.lax.fori_loop(0, pl.cdiv(dim, COLUMNS), tile, (jnp.zeros(ROWS),) * tokens)
      for t in range(tokens):
        out_ref[t, pl.ds(start, ROWS)] = sums[t]

  rows = _padded(rows)
  shape = tokens, len(rows)
  out = _call(kernel, (len(rows) // ROWS,), shape, interpret, rows, count.reshape(1), w.reshape(-1, dim), x)
  return out[:, :length]


def add(w: Array, rows: Array, count: Array, h: Array, block: int, interpret: bool = False) -> Array:
  """See gathered.Rows."""
  rows, count = _single(rows, count, block)
  tokens, dim = len(h), w.shape[-1]

  def kernel(rows_ref, count_ref, w_ref, h_ref, out_ref):
    column = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS)
    split = pl.program_id(1)
    inside = column < dim
    whole = jnp.broadcast_to(inside[None], (ROWS, COLUMNS))

    def tile(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
      at = pl.ds((split + i * SPLITS) * ROWS, ROWS)
      part = triton.load(w_ref.at[rows_ref[at][:, None], column[None]], mask=whole, other=0).astype(jnp.float32)
      return tuple(total + jnp.sum(h_ref[t, at][:, None] * part, axis=0) for t, total in enumerate(sums))

    tiles = pl.cdiv(count_ref[0], ROWS)
    mine = jnp.maximum(0, pl.cdiv(tiles - split, SPLITS))
    for t, total in enumerate(jax.lax.fori_loop(0, mine, tile, (jnp.zeros(COLUMNS),) * tokens)):
      triton.store(out_ref.at[split, t, column], total, mask=inside)

  rows, h = _padded(rows), jnp.pad(h, ((0, 0), (0, -h.shape[1] % ROWS)))
  grid, shape = (pl.cdiv(dim, COLUMNS), SPLITS), (SPLITS, tokens, dim)
  return _call(kernel, grid, shape, interpret, rows, count.reshape(1), w.reshape(-1, dim), h).sum(0)
