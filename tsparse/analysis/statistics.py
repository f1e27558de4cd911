"""What the entries of gate, up and hidden look like: zeros by token position, histograms (paper, Figures 3 and 5b).

Each function of (seen, settings) is an `Observe` of analysis/probe.py. The others turn its sums into numbers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.probe import Observe, Probed, Seen

Array = jax.Array
BINS = 81  # of a histogram: odd, so that zero is in the middle of one
MAGNITUDES = np.geomspace(1e-4, 1e4, 161).astype(np.float32)  # candidates for the range of a histogram

DEFINITIONS = {
  "per_position": "zero_fraction of the tokens at each position of their document (of their piece of it, where it is "
  "longer than a row), over all layers; null where the text has no such token",
  "histograms": "share of a layer's entries in each bin [edge, next edge), of those of routed tokens, and the shares "
  "below the first and from the last edge on. The edges are the same for all: as wide as 99.5% of all entries of gate "
  "and up in the first batch, 81 equal bins around zero. `gate` and `up` are x W, before the activation",
}


@dataclasses.dataclass(frozen=True)
class Together:
  """Several observations of one forward: their sums by name, each by the settings of its name.

  Attributes:
    parts: (name, observe) pairs.
  """

  parts: tuple[tuple[str, Observe], ...]

  def __call__(self, seen: Seen, settings: dict[str, Any]) -> dict[str, Any]:
    """The sums of each part, by name."""
    return {name: observe(seen, settings.get(name)) for name, observe in self.parts}


def by_layer(sums: dict[str, Any]) -> Any:
  """Sums by kind of FFN, as in `Probed`, put in one with a leading axis of all layers, a shared expert's added."""
  layers = sums["ffn"]
  if "shared" in sums:
    layers = jax.tree.map(np.add, layers, sums["shared"])
  if "first" in sums:
    layers = jax.tree.map(lambda *parts: np.concatenate(parts), sums["first"], layers)
  return layers


def zeros_by_position(seen: Seen, settings: Any) -> tuple[Array, Array]:
  """Zero entries of the hidden, and entries, [T] int32 each, of the tokens at each position."""
  del settings
  zeros = jnp.sum((seen.hidden == 0) & seen.reached[..., None], axis=(2, 3), dtype=jnp.int32)  # [B, T]
  entries = jnp.sum(seen.reached, axis=2, dtype=jnp.int32) * seen.hidden.shape[-1]
  empty = jnp.zeros(zeros.shape[1], jnp.int32)
  return empty.at[seen.positions].add(zeros), empty.at[seen.positions].add(entries)


def zero_fraction_per_position(probed: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[float]:
  """[T], NaN at positions that no token has."""
  zeros, entries = (x.sum(0) for x in by_layer(probed))
  with np.errstate(invalid="ignore"):
    return (zeros / entries).tolist()


def histograms(seen: Seen, edges: Array) -> dict[str, Array]:
  """By tensor, entries below each of the edges [G], as [G, T]; and all `entries`, [T]. int32."""
  below = lambda x: jax.lax.map(lambda edge: seen.count(x < edge), edges)  # noqa: E731
  parts = {"gate": below(seen.gate), "up": below(seen.up), "hidden": below(seen.hidden)}
  return parts | {"entries": seen.count(jnp.ones(seen.hidden.shape, bool))}


def magnitudes(seen: Seen, edges: Array) -> tuple[Array, Array]:
  """Entries of gate and up together that are at least as large as each of the edges [G] in magnitude, and entries."""
  above = jax.lax.map(lambda edge: sum(seen.count(jnp.abs(x) >= edge) for x in (seen.gate, seen.up)), edges)
  return above, 2 * seen.count(jnp.ones(seen.hidden.shape, bool))


def histogram_edges(first: Probed) -> np.ndarray:
  """[BINS + 1] float32: the least of MAGNITUDES that 99.5% of gate and up stay below, in `magnitudes` of a batch."""
  above, entries = by_layer(first.sums)
  enough = above.sum((0, 2)) <= 0.005 * entries.sum()
  reach = MAGNITUDES[np.argmax(enough)] if enough.any() else MAGNITUDES[-1]
  return np.linspace(-reach, reach, BINS + 1, dtype=np.float32)


def histogram_shares(sums: dict[str, Any], edges: np.ndarray) -> dict[str, Any]:
  """ "edges", by tensor the share of the entries in each bin [L][bins], and "below" and "above" the edges, [L] each."""
  layers = by_layer(sums)
  entries = layers.pop("entries").sum(-1)  # [L]
  shares = {name: below.sum(-1) / entries[:, None] for name, below in layers.items()}  # [L, G], cumulative
  return {
    "edges": edges.tolist(),
    **{name: np.diff(share, axis=1).tolist() for name, share in shares.items()},
    "below": {name: share[:, 0].tolist() for name, share in shares.items()},
    "above": {name: (1 - share[:, -1]).tolist() for name, share in shares.items()},
  }
