"""How good neuron predictors are: the threshold for a recall, recall and precision, and what is read with them.

All follow from histograms of the logits, one of each kind of entry of the hidden (KINDS), which are counted while a
text goes through the model. Thresholds lie on the histograms' edges, so that they say exactly what a mask does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.activations import activation
from tsparse.analysis.probe import Seen
from tsparse.models.config import ModelConfig
from tsparse.sparse.predictors.fit import logits_of, read

Array = jax.Array
# Entries whose gate lets nothing through, those that are zero although it does, and those that are not zero.
KINDS = ("closed", "open", "fired")
STEPS, REACH = 64, 32  # edges in a unit of the logits, and how far they go either way
# EDGES[j] is below the bins from j on: at it as a threshold, their entries are expected. The first lets all through.
EDGES = np.concatenate([[-np.inf], np.arange(-REACH * STEPS, REACH * STEPS + 1) / STEPS])

DEFINITIONS = {
  "recall": "share of the entries of the hidden that are not zero which the predictor expects (as in ProSparse, arXiv "
  "2402.13516), over the evaluated tokens, with experts over those routed to each",
  "precision": "share of the entries that the predictor expects which are not zero",
  "predicted_sparsity": "share of all entries that the predictor does not expect: they are not computed",
  "threshold": "of each layer (and expert): the largest multiple of 1/64 that keeps the target recall on text that "
  "follows the training text and was not trained on; -inf, which expects all, where nothing fired there or none does",
  "read": "weights of the FFNs read for one token, mean over tokens, of the experts it is routed to. dense: 3 D F. "
  "exact: the gate of all neurons, `up` where it is open, `down` where the hidden is not zero. predictor: fc1 and fc2, "
  "the gate of the expected neurons, `up` where that is open, `down` where the hidden is not zero, which is what "
  "--sparse=predictor does. Bytes are those times the size of a weight as stored; a weight read is a multiply-add, two "
  "operations (FLOPs)",
}


@dataclasses.dataclass(frozen=True)
class Histograms:
  """Observes [E, kinds, bins] int32 of each of some predictors, whose fc1 and fc2 are the settings, by name.

  Attributes:
    act: name of the activation.
    sources: (name, what it reads, one of fit.INPUTS).
  """

  act: str
  sources: tuple[tuple[str, str], ...]

  def __call__(self, seen: Seen, settings: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """The counts by name."""
    is_open = activation(self.act)(seen.gate, jnp.ones_like(seen.gate)) != 0
    kind = jnp.where(seen.hidden != 0, 2, is_open.astype(jnp.int32))  # [B, T, E, F]
    return {
      name: count(logits_of(read(seen, source), **settings[name]), kind, seen.reached) for name, source in self.sources
    }


def count(logits: Array, kind: Array, reached: Array) -> Array:
  """[E, kinds, bins] int32 of logits and kind [B, T, E, F] where reached [B, T, E].

  Bin j holds the logits above EDGES[j] and not above the next.
  The edges are multiples of a power of two, so that nothing is rounded.
  """
  experts, most, bins = logits.shape[2], REACH * STEPS, len(EDGES)
  place = jnp.clip(jnp.ceil(logits * STEPS), -most, most + 1).astype(jnp.int32) + most
  row = jnp.arange(experts)[:, None] * len(KINDS) + kind
  index = jnp.where(reached[..., None], row * bins + place, experts * len(KINDS) * bins)  # beyond the end: dropped
  counts = jnp.zeros(experts * len(KINDS) * bins, jnp.int32).at[index.reshape(-1)].add(1, mode="drop")
  return counts.reshape(experts, len(KINDS), bins)


def expected_at(counts: np.ndarray) -> np.ndarray:
  """[..., bins]: entries that are expected at each of EDGES, of the counts [..., bins]."""
  return np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]


def choose_thresholds(counts: np.ndarray, recall: float) -> np.ndarray:
  """[L, E] float32: the largest of EDGES that keeps `recall` of what fired, in counts [L, E, kinds, bins]."""
  fired = expected_at(counts[:, :, KINDS.index("fired")])  # [L, E, bins], falling
  enough = (fired >= recall * fired[..., :1]) & (fired[..., :1] > 0)
  last = enough.shape[-1] - 1 - np.argmax(enough[..., ::-1], axis=-1)
  return EDGES[np.where(enough.any(-1), last, 0)].astype(np.float32)


def quality(counts: np.ndarray, thresholds: np.ndarray, config: ModelConfig, weights: np.ndarray) -> dict[str, Any]:
  """What a mask does to a text.

  Args:
    counts: [L, E, kinds, bins] of the text.
    thresholds: [L, E], of EDGES.
    config: the model.
    weights: [L], of one predictor of each layer.

  Returns:
    "recall", "precision", "predicted_sparsity" over all and "per_layer"; "read" weights a token: "dense", "exact",
    "predictor".
  """
  at = np.searchsorted(EDGES, thresholds)[:, :, None, None]
  total = counts.sum(-1).sum(1)  # [L, kinds]
  expected = np.take_along_axis(expected_at(counts), at, axis=-1)[..., 0].sum(1)  # [L, kinds]
  per_layer = [_rates(*parts) for parts in zip(total, expected, strict=True)]

  def neurons(kinds: np.ndarray) -> np.ndarray:  # [L]: rows of gate, up and down, over all tokens
    return kinds.sum(-1) + kinds[:, 1:].sum(-1) + kinds[:, 2]

  chosen, dim = max(1, config.experts_per_token), config.d_model
  uses = total.sum(-1) / config.d_ff / chosen  # [L] tokens
  dense = chosen * config.num_layers * 3 * dim * config.d_ff
  exact = (dim * neurons(total) / uses).sum()
  predictor = (chosen * weights + dim * neurons(expected) / uses).sum()
  reads = {"dense": float(dense), "exact": float(exact), "predictor": float(predictor)}
  whole = _rates(total.sum(0), expected.sum(0))
  return whole | {"per_layer": {name: [layer[name] for layer in per_layer] for name in whole}, "read": reads}


def _rates(total: np.ndarray, expected: np.ndarray) -> dict[str, float]:
  """Of entries by kind, all and those expected; NaN where there is nothing to take a share of."""
  with np.errstate(invalid="ignore"):
    return {
      "recall": float(expected[2] / total[2]),
      "precision": float(expected[2] / expected.sum()),
      "predicted_sparsity": float(1 - expected.sum() / total.sum()),
    }


def tradeoff(counts: np.ndarray, recalls: np.ndarray) -> list[list[float]]:
  """[predicted sparsity, recall] over all layers for thresholds chosen on the same text, one for each target."""
  points = []
  total = counts.sum((0, 1, 3))
  for recall in recalls:
    at = np.searchsorted(EDGES, choose_thresholds(counts, recall))[:, :, None, None]
    expected = np.take_along_axis(expected_at(counts), at, axis=-1).sum((0, 1, 3))
    rates = _rates(total, expected)
    points.append([rates["predicted_sparsity"], rates["recall"]])
  return points
