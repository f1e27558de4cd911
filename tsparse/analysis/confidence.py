"""How far a figure could be from that of other documents of the same kind: bootstrap intervals over documents."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tsparse.data import EvaluationSet
from tsparse.evaluate.perplexity import Evaluation

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
BLOCK = 1 << 22  # draws that are in memory at one time

DEFINITIONS = {
  "confidence": f"percentile bootstrap, {LEVEL:.0%}: of {RESAMPLES} resamples of the documents with replacement (seed "
  f"{SEED}), the middle {LEVEL:.0%} of the ratio of sums, sum of -ln p over sum of tokens; perplexity is its exp. Zero "
  "fraction resamples the forward passes (batches of rows), for zeros are counted in each of these. None where there "
  "is one only. It says what other documents would change, not what another training run would",
  "difference": "loss of the second model minus that of the first on the same tokens, nats; its interval resamples "
  "documents for both models at once (paired), so what makes a document hard for both cancels",
}


def interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float] | None:
  """Percentile bootstrap interval of sum(numerators) / sum(denominators), [lo, hi]; None for fewer than 2 units.

  Args:
    numerators: [n], a sum for each unit (document) that is resampled.
    denominators: [n]; units of 0 (conversations in which the assistant says nothing) are left out.
  """
  numerators, denominators = (np.asarray(x)[np.asarray(denominators) > 0] for x in (numerators, denominators))
  units = len(numerators)
  if units < 2:
    return None
  rng, pairs = np.random.default_rng(SEED), np.stack([numerators, denominators], 1).astype(np.float64)
  ratios = []
  while sum(map(len, ratios)) < RESAMPLES:
    rows = min(RESAMPLES - sum(map(len, ratios)), max(1, BLOCK // units))
    above, below = pairs[rng.integers(units, size=(rows, units))].sum(1).T
    ratios.append(above / below)
  tail = 50 * (1 - LEVEL)
  return np.percentile(np.concatenate(ratios), [tail, 100 - tail]).tolist()


def per_document(evaluation: Evaluation, data: EvaluationSet) -> dict[str, list]:
  """Sum of -ln p (nats) and number of targets of each document, the key "per_document" of a model."""
  ids = np.concatenate([x[x >= 0] for x in data.document_ids])
  nll = np.concatenate([x[i >= 0] for x, i in zip(evaluation.token_nll, data.document_ids, strict=True)])
  return {
    "nll": np.bincount(ids, nll, data.documents).tolist(),
    "tokens": np.bincount(ids, minlength=data.documents).tolist(),
  }


def confidence(documents: dict[str, list], batch_zeros: np.ndarray) -> dict[str, Any]:
  """The key "confidence" of a model: intervals of loss, perplexity and zero fraction. See DEFINITIONS.

  Args:
    documents: of `per_document`.
    batch_zeros: [batches, 2], zeros and entries of the hidden of each forward pass.
  """
  loss = interval(np.array(documents["nll"]), np.array(documents["tokens"]))
  return {
    "loss": loss,
    "perplexity": loss and [math.exp(min(x, 700)) for x in loss],
    "zero_fraction": interval(*batch_zeros.T),
    "level": LEVEL,
    "resamples": RESAMPLES,
    "documents": len(documents["nll"]),
    "batches": len(batch_zeros),
  }


def comparisons(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The key "comparisons" of an analysis: every two models that were evaluated on the same tokens, in their order."""
  result = []
  for one, other in combinations(models, 2):
    a, b = one["per_document"], other["per_document"]
    if a["tokens"] != b["tokens"] or one["data"] != other["data"] or one["vocabulary"] != other["vocabulary"]:
      continue
    differences, tokens = np.subtract(b["nll"], a["nll"]), np.array(a["tokens"])
    result.append({
      "models": [one["name"], other["name"]],
      "difference": float(differences.sum() / tokens.sum()),
      "interval": interval(differences, tokens),
    })  # fmt: skip
  return result
