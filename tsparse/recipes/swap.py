"""The activation moves from SwiGLU to a ReLU one over the first part of training.

    hidden = ((1 - a) silu(gate) + a relu(gate)) * leaky(up, 1 - a)        leaky(x, s) = x if x > 0 else s x

a = 0 is SwiGLU and a = 1 exactly dReLU (Turbo Sparse, arXiv 2406.05955). Of `relu` (ReGLU) only the gate moves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def to_drelu(gate: Array, up: Array, share: Array) -> Array:
  """Hidden [..., F] of gate and up [..., F] at share a, a scalar in [0, 1] (traced), in the dtype of gate."""
  left = (1 - share).astype(up.dtype)
  return _gate(gate, share) * jnp.where(up > 0, up, left * up)


def to_relu(gate: Array, up: Array, share: Array) -> Array:
  """The same towards ReGLU: up stays as it is."""
  return _gate(gate, share) * up


def _gate(gate: Array, share: Array) -> Array:
  share = share.astype(gate.dtype)
  return (1 - share) * jax.nn.silu(gate) + share * jax.nn.relu(gate)


# Activation at the end -> the way there from swiglu.
WAYS: dict[str, Callable[[Array, Array, Array], Array]] = {"drelu": to_drelu, "relu": to_relu}


def share_at(step: Array, end: int) -> Array:
  """a, [] float32: from 0 before the first step in a straight line to 1, at which step `end` and all later ones are."""
  return jnp.clip(step / end, 0.0, 1.0).astype(jnp.float32)
