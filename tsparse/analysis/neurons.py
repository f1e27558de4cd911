"""Hot and cold neurons: how often each fires, how few do most of the work, and whether they are the same elsewhere.

Unless it says otherwise `fired` is [neurons] float64, the tokens for which each neuron of a layer fired.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.probe import Seen
from tsparse.errors import UserError
from tsparse.models.counts import ModelCounts

Array = jax.Array
HOT = 0.8  # of the activations (PowerInfer, arXiv 2312.12456)
TOP = 0.2  # of the neurons
POINTS = np.linspace(0, 1, 51)
FREQUENCIES = np.linspace(0, 1, 21)  # edges of the histogram of them
SAMPLE = 256  # neurons of a layer whose pairs are counted
RARE = 10  # a pair that fired together less often is not among the top ones
FORMS = ("numpy", "powerinfer")

DEFINITIONS = {
  "neurons": "a neuron fires for a token if its hidden entry is not exactly zero; the neurons of all experts of a "
  "layer count together, shared ones too. Without exact zeros all neurons fire always, and what follows is trivial",
  "frequency": "share of a layer's neurons whose own zero fraction (over the tokens that reached their expert) lies in "
  "each bin [edge, next edge), the last one closed; experts that no token reached are left out. That of every neuron: "
  "--export",
  "cdf": "share of all firings that the so-many most often firing neurons make",
  "hot_share_80": "least share of the neurons that makes 80% of the firings (PowerInfer, arXiv 2312.12456); `overall` "
  "chooses among the neurons of all layers together",
  "stability": "between the two halves of the text: the share of the 20% hottest neurons that are so in both, and the "
  "rank correlation (Spearman) of how often neurons fire; `between` is the same for every two texts (sources of a "
  "mixture, or --also)",
  "coactivation": "of 256 neurons of each layer, evenly spaced in the order of how often they fire, of those that do: "
  "lift of a pair = P(both) / (P(one) P(other)) over all real tokens, 1 if they are independent; `top`: the pairs of "
  "greatest lift, [neuron, neuron, lift, P(the other | the rarer one)], of those that fired together 10 times or more",
}


def layers(by_kind: ModelCounts) -> list[np.ndarray]:
  """`fired` of each layer: of its experts one after the other, and then of a shared one."""
  flat = {kind: c.fired.reshape(len(c.fired), -1) for kind, c in by_kind.items()}
  rest = np.concatenate([flat[kind] for kind in ("ffn", "shared") if kind in flat], axis=1)
  return [*flat.get("first", ()), *rest]


def zero_fractions(by_kind: ModelCounts) -> list[np.ndarray]:
  """Of each layer the zero fraction of each neuron, [neurons], in the order of `layers`; NaN where none was reached."""
  with np.errstate(invalid="ignore"):
    zeros = {kind: c.replace(fired=1 - c.fired / c.routed[..., None]) for kind, c in by_kind.items()}
  return layers(zeros)


def coverage(fired: np.ndarray, shares: np.ndarray) -> np.ndarray:
  """Share of all firings that the round(share * neurons) hottest neurons make, for each of the shares."""
  covered = np.concatenate([[0], np.cumsum(np.sort(fired)[::-1])]) / max(fired.sum(), 1)
  return covered[np.round(shares * len(fired)).astype(int)]


def hot_share(fired: np.ndarray, share: float = HOT) -> float:
  """Least share of the neurons that makes `share` of all firings; 0 if there are none."""
  covered = np.concatenate([[0], np.cumsum(np.sort(fired)[::-1])])
  return int(np.searchsorted(covered, share * covered[-1])) / len(fired)


def hot_overlap(one: np.ndarray, other: np.ndarray, top: float = TOP) -> float:
  """Share of the round(top * neurons) hottest by `one` that are so by `other` too; among equals the first are taken."""
  k = max(1, round(top * len(one)))
  return len(set(np.argsort(-one, kind="stable")[:k]) & set(np.argsort(-other, kind="stable")[:k])) / k


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
  """Pearson correlation of the ranks, equal values sharing their mean rank (Spearman); NaN if all are equal."""
  ranks = []
  for fired in (one, other):
    _, inverse, counts = np.unique(fired, return_inverse=True, return_counts=True)
    ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
  if any(np.ptp(rank) == 0 for rank in ranks):
    return float("nan")
  return float(np.corrcoef(*ranks)[0, 1])


def neuron_statistics(by_kind: ModelCounts) -> dict[str, Any]:
  """ "cdf", "hot_share_80" and "frequency" of the counts of a text."""
  fired = layers(by_kind)
  shares = [np.histogram(zeros[np.isfinite(zeros)], FREQUENCIES)[0] for zeros in zero_fractions(by_kind)]
  whole = np.concatenate(fired)
  hot = [hot_share(layer) for layer in fired]
  return {
    "cdf": {
      "share_of_neurons": POINTS.tolist(),
      "share_of_activations": coverage(whole, POINTS).tolist(),
      "per_layer": [coverage(layer, POINTS).tolist() for layer in fired],
    },
    "hot_share_80": {"overall": hot_share(whole), "mean": float(np.mean(hot)), "per_layer": hot},
    "frequency": {"edges": FREQUENCIES.tolist(), "per_layer": [(x / x.sum()).tolist() for x in shares]},
  }


def stability(one: ModelCounts, other: ModelCounts) -> dict[str, Any]:
  """ "hot_overlap" and "rank_correlation" between the counts of two texts, each with "mean" and "per_layer"."""
  pairs = list(zip(layers(one), layers(other), strict=True))
  found = {"hot_overlap": hot_overlap, "rank_correlation": rank_correlation}
  found = {name: [measure(*pair) for pair in pairs] for name, measure in found.items()}
  return {name: {"mean": float(np.mean(values)), "per_layer": values} for name, values in found.items()}


def between(by_text: dict[str, ModelCounts]) -> list[dict[str, Any]]:
  """`stability` between every two of some texts, each with the names of the two as "texts"."""
  pairs = itertools.combinations(by_text.items(), 2)
  return [{"texts": [one, other]} | stability(a, b) for (one, a), (other, b) in pairs]


def sample(by_kind: ModelCounts, size: int = SAMPLE) -> np.ndarray:
  """[L, size] int32: neurons of each layer (of its routed experts) for `coactivation`.

  Evenly spaced in the order of how often they fire, hottest first, among those that do; -1 where there are fewer.
  """
  chosen = []
  for fired in layers({kind: c for kind, c in by_kind.items() if kind != "shared"}):
    order = np.argsort(-fired, kind="stable")[: int((fired > 0).sum())]
    spaced = order[np.linspace(0, len(order) - 1, min(size, len(order))).round().astype(int)] if len(order) else order
    chosen.append(np.pad(spaced, (0, size - len(spaced)), constant_values=-1))
  return np.stack(chosen).astype(np.int32)


def coactivation(seen: Seen, chosen: Array) -> Array:
  """[n, n] float32: tokens for which both of two of the `chosen` neurons [n] fired; nothing for a shared expert's."""
  fired = ((seen.hidden != 0) & seen.reached[..., None]).reshape(*seen.positions.shape, -1)  # [B, T, E F]
  fired = (fired[..., chosen] & (chosen >= 0)).astype(jnp.bfloat16)  # 0 and 1 are exact
  return jnp.einsum("bti,btj->ij", fired, fired, preferred_element_type=jnp.float32)


def coactivation_statistics(sums: dict[str, np.ndarray], chosen: np.ndarray, real_tokens: int, top: int = 10):
  """The pairs of the sums of `coactivation` over so many tokens: "mean_lift", "share_above_2" and "top", by layer."""
  both = np.concatenate([sums[kind] for kind in ("first", "ffn") if kind in sums])  # [L, n, n]
  result = {"neurons": [], "mean_lift": [], "share_above_2": [], "top": []}
  for counted, neurons in zip(both, chosen, strict=True):
    n = int((neurons >= 0).sum())
    i, j = np.triu_indices(n, 1)
    alone, pair = np.diag(counted), counted[i, j]
    lift = pair * real_tokens / (alone[i] * alone[j])
    order = np.argsort(-np.where(pair >= RARE, lift, -1), kind="stable")[:top]
    rarer = np.minimum(alone[i], alone[j])
    result["neurons"].append(n)
    result["mean_lift"].append(float(lift.mean()) if n > 1 else None)
    result["share_above_2"].append(float((lift > 2).mean()) if n > 1 else None)
    result["top"].append([
      [int(neurons[i[p]]), int(neurons[j[p]]), float(lift[p]), float(pair[p] / rarer[p])]
      for p in order if pair[p] >= RARE
    ])  # fmt: skip
  return result


def check_form(form: str):
  """Raises UserError for a form of `export` that is unknown or cannot be written here; "" is none."""
  if form not in ("", *FORMS):
    raise UserError(f"--export={form} is unknown: choose one of {', '.join(FORMS)}.")
  if form == "powerinfer" and importlib.util.find_spec("torch") is None:
    raise UserError("--export=powerinfer writes files with torch, which is not installed: install it, or use numpy.")


def export(by_kind: ModelCounts, folder: Path, form: str):
  """Writes how often neurons fired as PowerInfer's solver reads it: `activation_{n}`, 1-D counts, one file a layer.

  Args:
    by_kind: the counts of a text.
    folder: made if missing; PowerInfer looks for one called `activation`.
    form: "powerinfer" for .pt files, which are pickles and need torch, or "numpy" for .npy ones under the same names.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for number, fired in enumerate(layers(by_kind)):
    if form == "powerinfer":
      import torch

      torch.save(torch.from_numpy(fired.astype(np.float32)), folder / f"activation_{number}.pt")
    else:
      np.save(folder / f"activation_{number}.npy", fired.astype(np.float32))
