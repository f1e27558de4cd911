"""What a mixture of experts adds: how tokens are spread, router and neurons together, and a curve of each expert."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.masks import TopK, kept, largest
from tsparse.analysis.probe import Seen
from tsparse.analysis.thresholds import dropped_error, size
from tsparse.data import EvaluationSet
from tsparse.evaluate.perplexity import evaluate_each
from tsparse.models import counts
from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.models.counts import ModelCounts
from tsparse.models.transformer import Transformer

Array = jax.Array

DEFINITIONS = {
  "load": "share of a layer's token choices that each expert got",
  "entropy": "- sum of load ln load over the experts of a layer, in nats; ln E if all got as many",
  "joint": "`routed`: share of the experts that a token reaches, k/E. `active_in_routed`: share of non-zero entries in "
  "the hidden of the experts reached, each expert weighted by its use. `active_of_all` = routed * active_in_routed: "
  "share of the weights of all routed experts that a token needs; `active_of_ffn` counts shared experts and the dense "
  "layers too. `paper`: Turbo Sparse (arXiv 2406.05955) says 97% of Mixtral's FFN weights stay idle, from 2 of 8 "
  "experts and 85% of zeros in each: that is 1 - 0.25 * 0.15 = 96.25%, so 0.0375 is active",
  "expert_curves": "`error` of a routed expert at a level: ||what the masked neurons add to its output|| / ||its "
  "output||, the mask the paper's top-k inside the expert; mean over the tokens that reach it, in the model as it is; "
  "null where none does. `perplexity` and `loss`: of the whole text with that one expert masked and all others left "
  "alone (measured by --parts=experts)",
}
PAPER = 0.25 * 0.15


def expert_statistics(by_kind: ModelCounts, config: ModelConfig) -> dict[str, Any]:
  """Load, entropy, joint sparsity and zero fractions of the layers that have experts, from the counts of a text."""
  routed = by_kind["ffn"]
  active = {kind: c.fired.sum() for kind, c in by_kind.items()}
  tokens = routed.routed.sum(1)[0] / config.experts_per_token
  neurons = {kind: np.prod(c.fired.shape) for kind, c in by_kind.items()}  # of all layers and experts
  share = config.experts_per_token / config.num_experts
  in_routed = 1 - counts.mean_zero_fraction(routed)
  with np.errstate(invalid="ignore"):  # NaN for an expert that no token reached
    per_expert = counts.zero_fraction(routed).tolist()
  return {
    "load": (routed.routed / routed.routed.sum(1, keepdims=True)).tolist(),
    "entropy": np.asarray(counts.expert_load_entropy(routed)).tolist(),
    "joint": {
      "routed": share,
      "active_in_routed": float(in_routed),
      "active_of_all": float(share * in_routed),
      "active_of_all_per_layer": (share * (1 - counts.mean_zero_fraction(routed, 1))).tolist(),
      "active_of_ffn": float(sum(active.values()) / (tokens * sum(neurons.values()))),
      "paper": PAPER,
    },
    "per_expert_zero_fraction": per_expert,
  }


def topk_errors(seen: Seen, levels: Array) -> tuple[Array, Array]:
  """Of each expert at the levels [G]: sum of the error of its output (DEFINITIONS), [E, G, 1], and tokens, [E, 1]."""
  score = size(seen.hidden)
  return dropped_error(seen, lambda level: largest(score, kept(level, score.shape[-1])), levels)


def error_curves(sums: dict[str, tuple[np.ndarray, np.ndarray]], levels: Sequence[float]) -> dict[str, Any]:
  """The "curves" of the sums of `topk_errors`: "levels", and "error" by layer that has experts, expert and level."""
  total, number = sums["ffn"]
  with np.errstate(invalid="ignore"):  # NaN for an expert that no token reached
    return {"levels": list(levels), "error": (total.sum(-1) / number.sum(-1, keepdims=True)).tolist()}


def alone(config: ModelConfig, levels: Sequence[float]) -> Iterable[tuple[int, int, float]]:
  """(layer, expert, level) of every pass of `masked_alone`; layers are those that have experts."""
  return itertools.product(range(ffn_layers(config)["ffn"]), range(config.num_experts), levels)


def masked_alone(
  model: Transformer,
  params: Any,
  data: EvaluationSet,
  mesh: jax.sharding.Mesh,
  levels: Sequence[float],
  progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """ "loss" and "perplexity" with one expert masked, by layer that has experts, expert and level.

  L E levels passes over the text, of one program. `progress` is called after each forward pass.
  """
  shape = ffn_layers(model.config)["ffn"], model.config.num_experts

  def mask(layer: int, expert: int, level: float) -> dict[str, TopK]:
    return {"ffn": TopK(jnp.zeros(shape, jnp.float32).at[layer, expert].set(level))}

  masks = [mask(*point) for point in alone(model.config, levels)]
  found = evaluate_each(model, params, data.batches, mesh, masks, progress)
  arrays = {"loss": [e.loss for e in found], "perplexity": [e.perplexity for e in found]}
  return {name: np.reshape(values, (*shape, len(levels))).tolist() for name, values in arrays.items()}
