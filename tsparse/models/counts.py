"""How often FFN neurons fire: the counts from which every sparsity figure is derived.

They are taken on the hidden `act(gate, up)`, the tensor that `down` reads, never on a layer's output. The functions
take numpy and JAX arrays alike.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

DEFINITIONS = {
  "zero_fraction": "share of entries of the FFN hidden (act(gate, up), the tensor that `down` reads) that are exactly "
  "zero, over all real tokens (padding excluded, scored or not) and, with experts, over those routed to each; means "
  "over layers and experts are weighted by the entries, shared experts included",
  "dead_neurons": "neurons whose hidden entry was exactly zero for every real token, scored or not",
}


@struct.dataclass
class HiddenCounts:
  """Firing counts of one FFN, or of one in each layer with a leading axis L. Dense ones have E = 1.

  Attributes:
    fired: [..., E, F] float32, tokens for which the neuron's hidden entry was not exactly zero.
    routed: [..., E] float32, tokens that reached the expert (padding never counts).
    by_token: [..., B, T] float32, entries of each token's hidden, of all experts it reached, that were not exactly zero
      (0 on padding); None where it was not asked for.
    penalty: [..., E] float32, sum over those tokens of the intervention's penalty of their hidden; None where it has
      none. It alone has a gradient.
  """

  fired: Array
  routed: Array
  by_token: Array | None = None
  penalty: Array | None = None


# The counts of a model by kind of FFN: "ffn" those of all layers, or the routed experts; "shared" the shared experts
# of the same layers; "first" the dense FFNs of the first layers. Each has a leading axis L of its own layers.
ModelCounts = Mapping[str, HiddenCounts]


def count_fired(hidden: Array, counted: Array) -> Array:
  """[..., F] float32: for each neuron the tokens with a non-zero hidden entry.

  Args:
    hidden: [B, T, ..., F].
    counted: [B, T, ...] bool, the tokens that count.
  """
  return jnp.sum((hidden != 0) & counted[..., None], axis=(0, 1), dtype=jnp.float32)


def count_fired_by_token(hidden: Array, counted: Array) -> Array:
  """[B, T] float32: for each token its non-zero hidden entries. Arguments as for `count_fired`."""
  return jnp.sum((hidden != 0) & counted[..., None], axis=tuple(range(2, hidden.ndim)), dtype=jnp.float32)


def sum_penalty(penalty: Callable[[Array], Array], hidden: Array, counted: Array) -> Array:
  """[...] float32: sum over the tokens and neurons of penalty(hidden). Arguments as for `count_fired`."""
  return jnp.sum(penalty(hidden).astype(jnp.float32), axis=(0, 1, -1), where=counted[..., None])


def penalty_per_layer(counts: ModelCounts) -> Array:
  """[L]: the penalties of each layer, those of a shared expert and of the routed ones added up."""
  layers = counts["ffn"].penalty.sum(1)
  if "shared" in counts:
    layers += counts["shared"].penalty.sum(1)
  return layers if "first" not in counts else jnp.concatenate([counts["first"].penalty.sum(1), layers])


def zero_fraction(counts: HiddenCounts) -> Array:
  """[L, E]: 1 - fired / (routed * F) of each expert; NaN for an expert that no token reached."""
  return 1.0 - counts.fired.mean(-1) / counts.routed


def mean_zero_fraction(counts: HiddenCounts, axis: Any = None) -> Array:
  """Zero fraction over the axes `axis` of [L, E] (default both), each expert weighted by the tokens routed to it."""
  return 1.0 - counts.fired.mean(-1).sum(axis) / counts.routed.sum(axis)


def model_zero_fraction(counts: ModelCounts) -> Array:
  """Zero fraction of a whole model: over all entries of the hidden of all its FFNs."""
  fired, entries = zip(*map(fired_and_entries, counts.values()), strict=True)
  return 1.0 - sum(x.sum() for x in fired) / sum(x.sum() for x in entries)


def zero_fraction_per_layer(counts: ModelCounts) -> Array:
  """[L]: zero fraction of each layer, a shared expert together with the routed ones."""
  fired, entries = fired_and_entries(counts["ffn"])
  if "shared" in counts:
    shared_fired, shared_entries = fired_and_entries(counts["shared"])
    fired, entries = fired + shared_fired, entries + shared_entries
  layers = 1.0 - fired / entries
  return layers if "first" not in counts else jnp.concatenate([mean_zero_fraction(counts["first"], 1), layers])


def fired_and_entries(counts: HiddenCounts) -> tuple[Array, Array]:
  """Entries of the hidden of each layer that fired, and all of them: [L] each."""
  return counts.fired.sum((1, 2)), counts.routed.sum(1) * counts.fired.shape[-1]


def dead_neurons(counts: HiddenCounts) -> Array:
  """[L, E]: neurons that never fired."""
  return (counts.fired == 0).sum(-1)


def expert_load_entropy(counts: HiddenCounts) -> Array:
  """[L], nats: - sum over e of p_e ln p_e, p_e the share of the routed tokens that expert e of the layer got.

  ln E when all got as many, 0 when one got all, or there were none.
  """
  share = counts.routed / jnp.maximum(counts.routed.sum(-1, keepdims=True), 1)
  return jax.scipy.special.entr(share).sum(-1)
