"""The search for thresholds: where a rising function of a threshold takes the asked values, in every FFN at once.

The first pass over the calibration text measures a grid of thresholds, in each FFN of the model as it is. The next ones
measure where the asked values must lie by what is known, until they lie there. What is expensive to measure has a shape
on the grid that costs little, something that rises about as it does. An "FFN" is a dense one, one routed expert, or the
shared one of a layer; the FFNs of a model stand in a row [N], those of each kind together (`FFNs`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.probe import Observe, probe
from tsparse.analysis.statistics import Together
from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.models.transformer import Transformer

GRID = np.geomspace(1e-7, 1e3, 81)  # thresholds that the first pass measures
NEAR = 0.001  # a target is met if its value is as near as this


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

  def through(self, epsilon: np.ndarray, value: np.ndarray) -> "Curves":
    """The same shifted so that they go through points [N, points]: by what each is off there, between them by
    interpolation over log epsilon."""
    found = []
    for mine, values, at, wanted in zip(self.epsilon, self.value, epsilon, value, strict=True):
      order = np.argsort(at)
      x, at, wanted = np.log(np.concatenate([mine, at])), np.log(at[order]), wanted[order]
      off = np.interp(x, at, wanted - np.interp(at, np.log(mine), values))
      found.append((np.exp(x), np.interp(x, np.log(mine), values) + off))
    return Curves.of(*map(np.stack, zip(*found, strict=True)))


def search(
  measure: Callable[[np.ndarray], np.ndarray], shape: Curves, targets: Sequence[float], passes: int = 5
) -> Curves:
  """Finds where a rising function of a threshold takes each of the targets, in every FFN.

  Args:
    measure: epsilon [N, G] -> values [N, G]; one pass over the text.
    shape: the function on a grid, or what rises about as it does.
    targets: the values looked for.
    passes: at most so many, until all targets are met to NEAR or the thresholds stay the same (where the function
      jumps over a target).
  """
  curves, epsilon, value = shape, np.zeros((len(shape.epsilon), 0)), np.zeros((len(shape.epsilon), 0))
  for _ in range(passes):
    guess = curves.at(targets)
    found = measure(guess)
    epsilon, value = np.hstack([epsilon, guess]), np.hstack([value, found])
    curves = shape.through(epsilon, value)
    if ((np.abs(found - targets) < NEAR) | np.isclose(curves.at(targets), guess, rtol=1e-3, atol=0)).all():
      break
  return curves


class Measure(NamedTuple):
  """Something that rises with a threshold.

  Attributes:
    observe: called with the thresholds [E, G] of a layer; returns sums [E, G, ...] and of how many they are, [E, ...].
    ffns: which have thresholds of their own.
    together: whether the values are those of all FFNs at once.
  """

  observe: Observe
  ffns: FFNs
  together: bool = False

  def values(self, sums: dict[str, tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> np.ndarray:
    """[N, G], of what was observed by kind of FFN. An expert that no token reached gets the mean of its layer."""
    if self.together:
      total, number = (sum(of[i].sum(axis) for of in sums.values()) for i, axis in ((0, (0, 1, 3)), (1, None)))
      return np.broadcast_to(total / number, shape)
    values = {}
    for kind, (total, number) in sums.items():  # [L, E, G, ...], [L, E, ...]
      number = number.sum(-1, keepdims=True)  # [L, E, 1]
      with np.errstate(invalid="ignore"):
        found = total.sum(-1) / number
      values[kind] = np.where(number > 0, found, np.nanmean(found, axis=1, keepdims=True))
    return self.ffns.row(values)


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

  def measured(self, measures: dict[str, Measure], epsilon: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By name of the measure its values at thresholds [N, G], of all in one pass over the text."""
    together = Together(tuple((name, measure.observe) for name, measure in measures.items()))
    settings: dict[str, dict[str, jax.Array]] = {}
    for name, measure in measures.items():
      for kind, of_kind in measure.ffns.by_kind(epsilon[name]).items():
        settings.setdefault(kind, {})[name] = jnp.asarray(of_kind, jnp.float32)
    sums = probe(self.model, self.params, self.batches, self.mesh, together, settings).sums
    by_name = {name: {kind: found[name] for kind, found in sums.items()} for name in measures}
    return {name: measure.values(by_name[name], epsilon[name].shape) for name, measure in measures.items()}

  def grid(self, measures: dict[str, Measure]) -> dict[str, Curves]:
    """The measures on GRID, in one pass over the text."""
    epsilon = {name: np.tile(GRID, (measure.ffns.number, 1)) for name, measure in measures.items()}
    values = self.measured(measures, epsilon)
    return {name: Curves.of(epsilon[name], values[name]) for name in measures}

  def thresholds(
    self, measures: dict[str, Measure], targets: Sequence[float], shapes: dict[str, Curves]
  ) -> dict[str, Curves]:
    """`search` for the targets of each measure from its shape, of all in the same passes over the text."""
    ends = np.cumsum([measure.ffns.number for measure in measures.values()])

    def split(row: np.ndarray) -> dict[str, np.ndarray]:
      return dict(zip(measures, np.split(row, ends[:-1]), strict=True))

    def measure(epsilon: np.ndarray) -> np.ndarray:
      return np.concatenate(list(self.measured(measures, split(epsilon)).values()))

    epsilon, value = (np.concatenate([getattr(shapes[name], x) for name in measures]) for x in ("epsilon", "value"))
    curves = search(measure, Curves(epsilon, value), targets)
    epsilon, value = split(curves.epsilon), split(curves.value)
    return {name: Curves(epsilon[name], value[name]) for name in measures}
