"""How often FFN neurons fire: the counts from which every sparsity figure is derived.

They are taken on the hidden `act(gate, up)`, the tensor that `down` reads, never on a layer's output. The functions
take numpy and JAX arrays alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

DEFINITIONS = {
  "zero_fraction": "share of entries of the FFN hidden (act(gate, up), the tensor that `down` reads) that are exactly "
  "zero, over the evaluated tokens (padding excluded) and, with experts, over the tokens routed to each expert; means "
  "over layers and experts are weighted by the tokens routed",
  "dead_neurons": "neurons whose hidden entry was exactly zero for every evaluated token",
}


@struct.dataclass
class HiddenCounts:
  """Firing counts of one layer, or of all of them with a leading axis L. Dense models have E = 1.

  Attributes:
    fired: [..., E, F] float32, tokens for which the neuron's hidden entry was not exactly zero.
    routed: [..., E] float32, tokens that reached the expert (padding never counts).
  """

  fired: Array
  routed: Array


def count_fired(hidden: Array, counted: Array) -> Array:
  """[..., F] float32: for each neuron the tokens with a non-zero hidden entry.

  Args:
    hidden: [B, T, ..., F].
    counted: [B, T, ...] bool, the tokens that count.
  """
  return jnp.sum((hidden != 0) & counted[..., None], axis=(0, 1), dtype=jnp.float32)


def zero_fraction(counts: HiddenCounts) -> Array:
  """[L, E]: 1 - fired / (routed * F) of each expert; NaN for an expert that no token reached."""
  return 1.0 - counts.fired.mean(-1) / counts.routed


def mean_zero_fraction(counts: HiddenCounts, axis: Any = None) -> Array:
  """Zero fraction over the axes `axis` of [L, E] (default both), each expert weighted by the tokens routed to it."""
  return 1.0 - counts.fired.mean(-1).sum(axis) / counts.routed.sum(axis)


def dead_neurons(counts: HiddenCounts) -> Array:
  """[L, E]: neurons that never fired."""
  return (counts.fired == 0).sum(-1)
