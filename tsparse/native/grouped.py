"""The products of models/grouped.py by grouped.cc, where `library.usable`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.native import build

Array = jax.Array


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
