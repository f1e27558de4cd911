"""Beyond one token at a time: the neurons that any of several tokens needs, and what is left to gain."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.probe import Probed, Seen
from tsparse.analysis.statistics import by_layer
from tsparse.evaluate.perplexity import Evaluation
from tsparse.models.config import FFNS, ModelConfig, parameter_counts

Array = jax.Array
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
WINDOWS = (1, 2, 4, 8, 16)

DEFINITIONS = {
  "union": "share of the FFN weights (of all experts) that none of several tokens decoded together reads: a neuron is "
  "read if it fires for any of them. `batch`: tokens of as many unrelated documents, the expectation over random ones "
  "of all real tokens. `window`: consecutive tokens of one document, as a speculative decoder verifies them",
  "expected_speedup": "bytes read without neuron sparsity (the experts that the tokens reach, whole) / bytes read with "
  "it (gate, up and down weights of the neurons that fire), of the FFN alone; `expected_speedup_model` with the other "
  "weights, attention, norms, router and head, on both sides. An upper bound: finding the neurons costs nothing, and "
  "neither do the key-value cache and arithmetic",
}


def batch_unions(natural: Evaluation, config: ModelConfig, sizes: Sequence[int] = BATCH_SIZES) -> list[dict[str, Any]]:
  """Unions over tokens drawn at random, from how often neurons fire alone.

  A neuron that fires for a share p of all tokens (with experts: that reach its expert and make it fire) is read by none
  of n independent ones with probability (1 - p)^n. So the expected zero fraction is mean over neurons of (1 - p)^n,
  without another look at the text, and an expert reached by a share q is read with probability 1 - (1 - q)^n. Requests
  that are alike share more neurons than that.
  """
  result = []
  for size in sizes:
    unread = {  # (neurons that none reads, those whose expert none reaches), by layer
      kind: (
        ((1 - c.fired / natural.real_tokens) ** size).sum((1, 2)),
        ((1 - c.routed / natural.real_tokens) ** size).sum(1) * c.fired.shape[-1],
      )
      for kind, c in natural.counts.items()
    }
    neurons = _neurons(natural)
    read, reached = ({kind: neurons[kind] - parts[i] for kind, parts in unread.items()} for i in (0, 1))
    result.append({"size": size} | _union(read, reached, neurons, config))
  return result


@dataclasses.dataclass(frozen=True)
class Windows:
  """Observes windows of consecutive tokens of one document.

  Attributes:
    sizes: of the windows: 1, 2, 4, ...
  """

  sizes: tuple[int, ...] = WINDOWS

  def __call__(self, seen: Seen, settings: Any) -> dict[str, Array]:
    """Neurons "read" and neurons of the experts "reached" in all windows of each size, and "windows", [sizes, T] each.

    A window ends at each token that has enough tokens of its segment before it.
    """
    del settings
    valid = seen.reached.any(axis=2)  # [B, T]
    fired = (seen.hidden != 0) & seen.reached[..., None]  # [B, T, E, F], in any of the `size` tokens up to each
    reached = seen.reached
    sums = []
    for size in self.sizes:
      whole = valid & (seen.positions >= size - 1)
      sums.append({
        "read": jnp.sum(fired & whole[..., None, None], axis=(0, 2, 3), dtype=jnp.int32),
        "reached": jnp.sum(reached & whole[..., None], axis=(0, 2), dtype=jnp.int32) * fired.shape[-1],
        "windows": jnp.sum(whole, axis=0, dtype=jnp.int32),
      })  # fmt: skip
      fired, reached = fired | _delayed(fired, size), reached | _delayed(reached, size)
    return jax.tree.map(lambda *x: jnp.stack(x), *sums)


def _delayed(x: Array, steps: int) -> Array:
  """x [B, T, ...] of `steps` tokens before, zero where there is none."""
  return jnp.pad(x, [(0, 0), (steps, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]]


def window_unions(
  probed: Probed, sums: dict[str, Any], config: ModelConfig, sizes: Sequence[int] = WINDOWS
) -> list[dict[str, Any]]:
  """Unions over the windows that `Windows(sizes)` summed up; a size for which the text has no window is left out."""
  neurons, result = _neurons(probed), []
  for i, size in enumerate(sizes):
    windows = sums["ffn"]["windows"][0, i].sum()
    if windows:
      read, reached = (
        {kind: found[name][:, i].sum(-1) / windows for kind, found in sums.items()} for name in ("read", "reached")
      )
      result.append({"size": size} | _union(read, reached, neurons, config))
  return result


def _neurons(counted: Evaluation | Probed) -> dict[str, np.ndarray]:
  """Neurons of each layer, of all its experts, [L] by kind of FFN."""
  return {kind: np.full(len(c.fired), float(np.prod(c.fired.shape[1:]))) for kind, c in counted.counts.items()}


def _union(
  read: dict[str, np.ndarray], reached: dict[str, np.ndarray], neurons: dict[str, np.ndarray], config: ModelConfig
) -> dict[str, Any]:
  """Zero fractions and speedups from the neurons read, and those of the experts reached, [L] by kind of FFN."""
  counts = parameter_counts(config)
  per_neuron = sum(counts[kind] for kind in FFNS) / sum(x.sum() for x in neurons.values())
  head = "embedding" if config.tie_embeddings else "head"
  others = sum(counts[name] for name in ("attention", "norms", "router", head)) / per_neuron  # in neurons
  read, reached, neurons = map(by_layer, (read, reached, neurons))  # [L]
  with np.errstate(divide="ignore", invalid="ignore"):
    ffn = np.divide(reached.sum(), read.sum())
  return {
    "zero_fraction": float(1 - read.sum() / neurons.sum()),
    "per_layer": (1 - read / neurons).tolist(),
    "expected_speedup": float(ffn),
    "expected_speedup_model": float((others + reached.sum()) / (others + read.sum())),
  }
