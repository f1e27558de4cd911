"""The kernels of kernels.cc as JAX functions: those of reference.py, for CPUs. `available` compiles them.

They run on one device. table.py wraps a call where arrays are sharded: jit would gather them around it.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.activations import Activation
from tsparse.native import build
from tsparse.native.build import BEST
from tsparse.sparse.kernels import reference
from tsparse.sparse.kernels.reference import MODES, Neurons, Predictor, place

__all__ = ["attend", "available", "feed_forward", "linear", "place", "read"]

Array = jax.Array
HANDLERS = ("tsparse_linear", "tsparse_feed_forward", "tsparse_attend", "tsparse_read")
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "relu", "relu2", "drelu", "shifted_relu", "fatrelu")  # as kernels.cc


@functools.cache
def available() -> bool:
  """Whether these kernels can be used; says once, in one line on stderr, if they cannot and why."""
  try:
    build.register(Path(__file__).with_name("kernels.cc"), HANDLERS)
  except build.BuildError as error:
    say_fallback("native", str(error))
    return False
  return True


def say_fallback(kind: str, reason: str):
  """One line on stderr: there are no kernels of that kind, and why."""
  print(f"{kind} kernels are not used: {reason}; decoding runs in jnp, where zeros save no time.", file=sys.stderr)


def _call(name: str, shapes: list[tuple[int, ...]], *args: Array, level: int, **attributes) -> list[Array]:
  out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.ffi.ffi_call(name, out)(*args, level=np.int64(level), **attributes)


def linear(x: Array, w: Array, level: int = BEST) -> Array:
  """See reference.linear."""
  return _call("tsparse_linear", [(x.shape[0], w.shape[0])], x, w, level=level)[0]


def feed_forward(
  mode: str,
  activation: Activation,
  x: Array,
  chosen: Array,
  weights: Array,
  neurons: Neurons,
  predictor: Predictor | None = None,
  level: int = BEST,
) -> tuple[Array, Array]:
  """See reference.feed_forward. The results of "exact" are those of "off", bit for bit, if all weights are finite."""
  name, _, parameter = activation.name.partition(":")
  extra = () if predictor is None else (predictor.x, predictor.fc1, predictor.fc2)
  extra += () if predictor is None or predictor.threshold is None else (predictor.threshold,)
  out, fired = _call(
    "tsparse_feed_forward",
    [x.shape, x.shape[:1]],
    *(x, chosen, weights, *neurons, *extra),
    level=level,
    activation=np.int64(ACTIVATIONS.index(name)),
    parameter=np.float32(parameter or 0),
    mode=np.int64(MODES.index(mode)),
  )
  return out, fired


def attend(
  query: Array,
  key: Array,
  value: Array,
  positions: Array,
  window: int,
  scale: float,
  cap: float = 0.0,
  level: int = BEST,
) -> Array:
  """See reference.attend, which takes over for more than one query of a row (T > 1)."""
  if query.shape[1] > 1:
    return reference.attend(query, key, value, positions, window, scale, cap)
  args = query[:, 0], key, value, positions[:, 0]
  attributes = {"window": np.int64(window), "scale": np.float32(scale), "cap": np.float32(cap)}
  return _call("tsparse_attend", [args[0].shape], *args, level=level, **attributes)[0][:, None]


def read(data: Array, level: int = BEST) -> Array:
  """[1] uint32 of no meaning: reads all of `data` once, which is what a benchmark measures the bandwidth by."""
  out = jax.ShapeDtypeStruct((1,), jnp.uint32)
  return jax.ffi.ffi_call("tsparse_read", out)(data, level=np.int64(level))
