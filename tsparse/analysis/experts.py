"""What a mixture of experts adds: how tokens are spread over the experts, and the sparsity of router and neurons."""

from typing import Any

import numpy as np

from tsparse.models import counts
from tsparse.models.config import ModelConfig
from tsparse.models.counts import ModelCounts

DEFINITIONS = {
  "load": "share of a layer's token choices that each expert got",
  "entropy": "- sum of load ln load over the experts of a layer, in nats; ln E if all got as many",
  "joint": "`routed`: share of the experts that a token reaches, k/E. `active_in_routed`: share of non-zero entries in "
  "the hidden of the experts reached, each expert weighted by its use. `active_of_all` = routed * active_in_routed: "
  "share of the weights of all routed experts that a token needs; `active_of_ffn` counts shared experts and the dense "
  "layers too. `paper`: Turbo Sparse (arXiv 2406.05955) says 97% of Mixtral's FFN weights stay idle, from 2 of 8 "
  "experts and 85% of zeros in each: that is 1 - 0.25 * 0.15 = 96.25%, so 0.0375 is active",
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
