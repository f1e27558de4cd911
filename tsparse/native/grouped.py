"""The products of models/grouped.py by grouped.cc: float32, on CPUs. `available` compiles it."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.native import build

Array = jax.Array
HANDLERS = ("tsparse_grouped_products", "tsparse_grouped_transposed", "tsparse_grouped_outers")


@functools.cache
def available() -> bool:
  """Whether there is a library; says once, in one line on stderr, if there is none and why."""
  try:
    build.register(Path(__file__).with_name("grouped.cc"), HANDLERS)
  except build.BuildError as error:
    print(f"native products are not used: {error}; XLA multiplies experts in blocks, more slowly.", file=sys.stderr)
    return False
  return True


def usable(x: Array) -> bool:
  """Whether products with x can be had here: float32, on a CPU.

  All lowerings are traced wherever a model runs, and what runs on an accelerator needs no compiler.
  """
  return x.dtype == jnp.float32 and jax.default_backend() == "cpu" and available()


def products(x: Array, ws: Sequence[Array], group_sizes: Array, level: int = build.BEST) -> tuple[Array, ...]:
  """x[s] @ w[e] for each w: [S, D], [E, D, F] -> [S, F]."""
  shapes = [(x.shape[0], w.shape[2]) for w in ws]
  return tuple(_call("tsparse_grouped_products", shapes, group_sizes, x, *ws, level=level))


def transposed(douts: Sequence[Array], ws: Sequence[Array], group_sizes: Array, level: int = build.BEST) -> Array:
  """dout[s] @ w[e]^T, summed over the pairs of the two: [S, F], [E, D, F] -> [S, D]."""
  shape = douts[0].shape[0], ws[0].shape[1]
  return _call("tsparse_grouped_transposed", [shape], group_sizes, *douts, *ws, level=level)[0]


def outers(x: Array, douts: Sequence[Array], group_sizes: Array, level: int = build.BEST) -> tuple[Array, ...]:
  """x[s]^T dout[s] summed over the rows of each group, for each dout: [S, D], [S, F] -> [E, D, F]."""
  shapes = [(group_sizes.shape[0], x.shape[1], dout.shape[1]) for dout in douts]
  return tuple(_call("tsparse_grouped_outers", shapes, group_sizes, x, *douts, level=level))


def _call(name: str, shapes: list[tuple[int, ...]], *args: Array, level: int) -> list[Array]:
  out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.ffi.ffi_call(name, out, vmap_method="sequential")(*args, level=np.int64(level))
