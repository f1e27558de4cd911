"""The kernels of decoding for TPUs, in Pallas; see gathered.py for what is listed and when.

A list of rows is prefetched to the scalar core, which copies the rows from HBM to VMEM while those before them are
multiplied. An array [F, D] lies in HBM in tiles of 8 or 16 rows, so that a neuron would be D/128 pieces: `place` keeps
weights as [E, F, D/128, 128], where a neuron is one piece (8 kB of Mistral's, a copy that the bandwidth bears).

Bytes of one FFN of Mistral's shape (D 4096, F 14336, bfloat16), of 352 MB dense, at 90 % zeros and a third of the gates
open: exact reads gate 117 + up 37 + down 12 = 166 MB, so 2.1 times less is the limit; predictor reads 35 MB of rows and
its predictor (46 MB at rank 1260): 4.3 times less. Compiled by libtpu, compared with jnp by interpretation, and never
run on a TPU: no speed is known.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tsparse.activations import Activation
from tsparse.sparse.kernels import gathered, reference
from tsparse.sparse.kernels.reference import Neurons, Predictor, attend, linear

__all__ = ["attend", "feed_forward", "linear", "place"]  # products and attention that read everything are XLA's

Array = jax.Array
LANES = 128
CHUNK = 128  # neurons that are in VMEM together, of two such buffers
SCALARS = 3 * 2**18  # bytes of a list and of what its rows are multiplied by, of the scalar core's 1 MB


def place(neurons: Neurons) -> Neurons:
  """[E, F, D] -> [E, F, D/128, 128]; D must be a multiple of 128."""
  return Neurons(*(w.reshape(*w.shape[:2], -1, LANES) for w in neurons))


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
  """See reference.feed_forward; neurons are those of `place`, or [E, F, D] where all rows are to be read.

  Of more than gathered.MOST tokens all rows are read, by XLA, which lays the neurons out anew: a prompt can bear it.
  """
  experts, width = neurons.gate.shape[:2]
  if len(x) > gathered.MOST or neurons.gate.ndim == 3:
    flat = Neurons(*(w.reshape(experts, width, -1) for w in neurons))
    return reference.feed_forward(mode, activation, x, chosen, weights, flat, predictor)
  kernel = gathered.Rows(*(functools.partial(function, interpret=interpret) for function in (dot, add)))

  def scalars(tokens: int) -> int:  # bytes of a list and of what its rows are multiplied by
    return 4 * (tokens + 1) * width * min(experts, tokens * chosen.shape[1])

  together = next((n for n in range(len(x), 1, -1) if scalars(n) <= SCALARS), 1)
  parts = []
  for start in range(0, len(x), together):
    some = slice(start, start + together)
    read = predictor and predictor._replace(x=predictor.x[some])
    args = x[some], chosen[some], weights[some], neurons, read, math.gcd(width, CHUNK)
    parts.append(gathered.feed_forward(kernel, mode, activation, *args))
  out, fired = zip(*parts, strict=True)
  return jnp.concatenate(out), jnp.concatenate(fired)


def _in_chunks(count: Array, rows, w, buffer, semaphores, use, carry):
  """use(step, rows [chunk, ...] in VMEM, carry) for each chunk of listed rows, the next on its way meanwhile.

  Of the last chunk only the listed rows are copied: behind them stand those of an earlier chunk.
  """
  chunk = buffer.shape[1]
  steps = pl.cdiv(count, chunk)

  def copies(step: Array, action: str):
    slot = step % 2

    def one(i: Array, _: None) -> None:
      copy = pltpu.make_async_copy(w.at[rows[step * chunk + i]], buffer.at[slot, i], semaphores.at[slot])
      getattr(copy, action)()

    jax.lax.fori_loop(0, jnp.clip(count - step * chunk, 0, chunk), one, None)

  def body(step: Array, carry):
    copies(step + 1, "start")
    copies(step, "wait")
    return use(step, buffer.at[step % 2], carry)

  copies(jnp.int32(0), "start")
  return jax.lax.fori_loop(0, steps, body, carry)


def dot(w: Array, rows: Array, count: Array, x: Array, block: int, interpret: bool = False) -> Array:
  """See gathered.Rows; w is [E, F, D/128, 128]."""
  tokens, length = len(x), len(rows) * block
  slab = w.shape[2:]  # of a neuron
  chunk = CHUNK // block

  def kernel(count, rows, x, w, out, buffer, semaphores):
    def use(step: Array, part, _: None) -> None:
      part = part[...].astype(jnp.float32).reshape(CHUNK, *slab)
      for t in range(tokens):
        lanes = jnp.sum(part * x[t][None], axis=1)  # [CHUNK, 128]; their sums are put side by side by a product
        sums = jax.lax.dot_general(
          jnp.ones((8, LANES)), lanes, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )
        out[pl.ds(t, 1), pl.ds(pl.multiple_of(step * CHUNK, CHUNK), CHUNK)] = sums[:1]

    _in_chunks(count[0], rows, w, buffer, semaphores, use, None)

  rows = jnp.pad(rows, (0, -len(rows) % chunk))
  out = _call(
    kernel, (tokens, len(rows) * block), chunk, interpret, count, rows, x.reshape(tokens, *slab), w, block,
    pl.BlockSpec((tokens, *slab), lambda i, *_: (0, 0, 0)),
  )  # fmt: skip
  return out[:, :length]


def add(w: Array, rows: Array, count: Array, h: Array, block: int, interpret: bool = False) -> Array:
  """See gathered.Rows; w is [E, F, D/128, 128]."""
  tokens, slab, chunk = len(h), w.shape[2:], CHUNK // block
  rows = jnp.pad(rows, (0, -len(rows) % chunk))
  length = len(rows) * block

  def kernel(count, rows, h, w, out, buffer, semaphores):
    buffer[...] = jnp.zeros_like(buffer)  # what is not copied is multiplied by 0, and must be a number

    def use(step: Array, part, sums: tuple[Array, ...]) -> tuple[Array, ...]:
      def one(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        row = part[jax.lax.div(i, block), jax.lax.rem(i, block)].astype(jnp.float32)
        return tuple(total + h[t * length + step * CHUNK + i] * row for t, total in enumerate(sums))

      return jax.lax.fori_loop(0, CHUNK, one, sums, unroll=8)

    sums = _in_chunks(count[0], rows, w, buffer, semaphores, use, (jnp.zeros(slab),) * tokens)
    for t, total in enumerate(sums):
      out[t] = total

  h = jnp.pad(h, ((0, 0), (0, length - h.shape[1]))).reshape(-1)
  scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
  out = _call(kernel, (tokens, *slab), chunk, interpret, count, rows, h, w, block, scalars)
  return out.reshape(tokens, -1)


def _call(kernel, shape, chunk, interpret, count, rows, vectors, w, block, spec) -> Array:
  """Runs kernel(count, rows, vectors, w, out, buffer, semaphores) once; w stays in HBM, `block` rows together."""
  slab = block, *w.shape[2:]
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(1,),
      in_specs=[spec, pl.BlockSpec(memory_space=pltpu.HBM)],
      out_specs=pl.BlockSpec(shape, lambda i, *_: (0,) * len(shape)),
      scratch_shapes=[pltpu.VMEM((2, chunk, *slab), w.dtype), pltpu.SemaphoreType.DMA((2,))],
    ),
    interpret=interpret,
  )(count.reshape(1), rows.astype(jnp.int32), vectors, w.reshape(-1, *slab))
