"""Parameters and operations of one token, counted from the architecture and the zeros, under named definitions."""

from collections.abc import Mapping
from typing import Any

from tsparse.models.config import (
  ACTIVATED_DEFINITION,
  FFNS,
  ModelConfig,
  activated_parameters,
  parameter_counts,
)
from tsparse.models.flops import forward_flops

# Name -> the components of `parameter_counts` that are left out of both counts.
ACCOUNTS = {
  "all weights": (),
  "without embeddings": ("embedding", "head"),
  "without predictors": ("predictor",),
  "without embeddings or predictors": ("embedding", "head", "predictor"),
}

DEFINITIONS = {
  "activated": ACTIVATED_DEFINITION,
  "embeddings": "the input embedding and the output head, each V x D (one matrix where they are tied). Turbo Sparse "
  "prints 3B and 4.5B activated, which fit all weights with predictors, and 4.3B, which fits the same without "
  "embeddings; it gives no formula (arXiv 2406.05955, section 6.1 and Table 6)",
  "flops": "operations of the forward pass for one token, 2 for each multiply-add of a matrix product, scores of "
  "attention over a whole row of T included (models/flops.py); activated: the products of the FFNs times 1 - zero "
  "fraction of their kind. It is the least that skipping zeros can leave: finding them is counted only as predictors",
}


def accounting(config: ModelConfig, zero_fractions: Mapping[str, float], seq_len: int) -> dict[str, Any]:
  """The keys "parameters" and "flops" of a model. See DEFINITIONS.

  Args:
    config: the model.
    zero_fractions: share of the hidden that is exactly zero, by kind of FFN.
    seq_len: T of the scores of attention.
  """
  accounts = [
    {"name": name, "without": list(out)} | count(config, zero_fractions, out) for name, out in ACCOUNTS.items()
  ]
  dense = forward_flops(config, seq_len)
  sparse = sum(n * (1 - zero_fractions[name] if name in FFNS and n else 1) for name, n in dense.items())
  return {
    "parameters": count(config, zero_fractions) | {"definition": ACTIVATED_DEFINITION, "accounts": accounts},
    "flops": {"total": sum(dense.values()), "activated": sparse, "seq_len": seq_len},
  }


def count(config: ModelConfig, zero_fractions: Mapping[str, float], without: tuple[str, ...] = ()) -> dict[str, float]:
  """Total and activated parameters but those of the components `without`."""
  total = sum(number for name, number in parameter_counts(config).items() if name not in without)
  return {"total": total, "activated": activated_parameters(config, zero_fractions, without)}
