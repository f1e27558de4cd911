"""The search for thresholds: where a rising function of a threshold takes the asked values, in every FFN at once.

A pass over the calibration text measures many thresholds, in each FFN of the model as it is, and the next pass measures
where the asked values must lie between them. An "FFN" is a dense one, one routed expert, or the shared one of a layer;
the FFNs of a model stand in a row [N], those of each kind together (`FFNs`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.probe import Observe, probe
from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.models.transformer import Transformer

GRID = np.geomspace(1e-7, 1e3, 21)  # thresholds that the first pass measures; the others measure as many: one program


@dataclasses.dataclass(frozen=True)
class FFNs:
  """The FFNs of a model in a row.

  Attributes:
    shapes: by kind of FFN (layers, experts); one expert where it is dense.
  """

  shapes: dict[str, tuple[int, int]]

  @staticmethod
  def of(config: ModelConfig, each_expert: bool = True) -> "FFNs":
    """Those of a model; unless `each_expert` the routed experts of a layer are one."""
    experts = config.num_experts if config.num_experts and each_expert else 1
    return FFNs({kind: (layers, experts if kind == "ffn" else 1) for kind, layers in ffn_layers(config).items()})

  @property
  def number(self) -> int:
    """N."""
    return sum(layers * experts for layers, experts in self.shapes.values())

  def by_kind(self, row: np.ndarray) -> dict[str, np.ndarray]:
    """[N, ...] -> [layers, experts, ...] by kind."""
    ends = np.cumsum([layers * experts for layers, experts in self.shapes.values()])[:-1]
    parts = zip(self.shapes.items(), np.split(row, ends), strict=True)
    return {kind: part.reshape(*shape, *row.shape[1:]) for (kind, shape), part in parts}

  def row(self, by_kind: dict[str, np.ndarray]) -> np.ndarray:
    """The way back."""
    return np.concatenate([by_kind[kind].reshape(-1, *by_kind[kind].shape[2:]) for kind in self.shapes])


@dataclasses.dataclass(frozen=True)
class Curves:
  """What was measured at which thresholds, of each FFN.

  Attributes:
    epsilon: [N, G], ascending.
    value: [N, G], not falling.
  """

  epsilon: np.ndarray
  value: np.ndarray

  @staticmethod
  def of(epsilon: np.ndarray, value: np.ndarray) -> "Curves":
    """The same in ascending order."""
    order = np.argsort(epsilon, axis=1)
    epsilon, value = (np.take_along_axis(x, order, axis=1) for x in (epsilon, value))
    return Curves(epsilon, np.maximum.accumulate(value, axis=1))  # cancelling neurons may make CETT fall a little

  def at(self, targets: Sequence[float]) -> np.ndarray:
    """[N, targets]: thresholds that give the targets, by interpolation of log epsilon; the ends beyond the ends."""
    return np.exp([np.interp(targets, value, np.log(e)) for e, value in zip(self.epsilon, self.value, strict=True)])


def search(
  measure: Callable[[np.ndarray], np.ndarray], number: int, targets: Sequence[float], passes: int = 5
) -> Curves:
  """Finds where a rising function of a threshold takes each of the targets, in every FFN.

  Args:
    measure: epsilon [N, G] -> values [N, G]; one pass over the text.
    number: N.
    targets: the values looked for.
    passes: at most so many after the first, until all targets are met to 0.001 or the thresholds stay the same (where
      the function jumps over a target).
  """
  epsilon = np.tile(GRID, (number, 1))
  curves = Curves.of(epsilon, measure(epsilon))
  wanted = np.resize(targets, GRID.size)  # some of them more than once
  for _ in range(passes):
    guess = curves.at(wanted)
    value = measure(guess)
    curves = Curves.of(np.hstack([curves.epsilon, guess]), np.hstack([curves.value, value]))
    if ((np.abs(value - wanted) < 0.001) | np.isclose(curves.at(wanted), guess, rtol=1e-3, atol=0)).all():
      break
  return curves


@dataclasses.dataclass(frozen=True)
class Calibrator:
  """A model and the text that its thresholds are found on.

  Attributes:
    model: the decoder.
    params: its parameters.
    batches: the calibration text.
    mesh: the devices.
  """

  model: Transformer
  params: Any
  batches: Sequence[dict[str, np.ndarray]]
  mesh: jax.sharding.Mesh

  def curves(self, observe: Observe, ffns: FFNs, targets: Sequence[float], together: bool = False) -> Curves:
    """`search` for the targets of what is observed at thresholds; `together` of all FFNs at once, at one epsilon.

    `observe` is called with the thresholds [E, G] of a layer and returns sums [E, G, ...] and of how many they are,
    [E, ...]. An expert that no token reached has no values: it gets the mean of those of its layer.
    """

    def measure(epsilon):
      settings = {kind: jnp.asarray(e, jnp.float32) for kind, e in ffns.by_kind(epsilon).items()}
      sums, values = probe(self.model, self.params, self.batches, self.mesh, observe, settings).sums, {}
      if together:
        total, number = (sum(of[i].sum(axis) for of in sums.values()) for i, axis in ((0, (0, 1, 3)), (1, None)))
        return np.broadcast_to(total / number, epsilon.shape)
      for kind, (total, number) in sums.items():  # [L, E, G, ...], [L, E, ...]
        number = number.sum(-1, keepdims=True)  # [L, E, 1]
        with np.errstate(invalid="ignore"):
          found = total.sum(-1) / number
        values[kind] = np.where(number > 0, found, np.nanmean(found, axis=1, keepdims=True))
      return ffns.row(values)

    return search(measure, ffns.number, targets)
