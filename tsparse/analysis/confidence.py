"""How far a figure could be from that of other documents of the same kind: bootstrap intervals over documents."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tsparse.evaluate.perplexity import Documents

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
BLOCK = 1 << 22  # draws that are in memory at one time

DEFINITIONS = {
  "confidence": f"percentile bootstrap, {LEVEL:.0%}: of {RESAMPLES} resamples of the documents with replacement (seed "
  f"{SEED}), the middle {LEVEL:.0%} of the ratio of sums: sum of -ln p over sum of tokens, whose exp is perplexity's, "
  "and sum of zeros over sum of entries of the hidden. None where there is one document only. It says what other "
  "documents would change, not what another training run would",
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


def per_document(documents: Documents) -> dict[str, list]:
  """The key "per_document" of a model: sum of -ln p (nats), scored targets, and share of zeros in the hidden."""
  nll, tokens, zeros, entries = documents.sums.T
  with np.errstate(invalid="ignore"):  # NaN for a document without tokens
    return {"nll": nll.tolist(), "tokens": tokens.astype(int).tolist(), "zero_fraction": (zeros / entries).tolist()}


def confidence(documents: Documents) -> dict[str, Any]:
  """The key "confidence" of a model: intervals of loss, perplexity and zero fraction. See DEFINITIONS.

  Costs: 2000 resamples draw 2000 * documents numbers, some at a time (BLOCK); of a text only the four sums of each
  document are kept, 32 bytes.
  """
  nll, tokens, zeros, entries = documents.sums.T
  loss = interval(nll, tokens)
  return {
    "loss": loss,
    "perplexity": loss and [math.exp(min(x, 700)) for x in loss],
    "zero_fraction": interval(zeros, entries),
    "level": LEVEL,
    "resamples": RESAMPLES,
    "documents": len(documents.sums),
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
