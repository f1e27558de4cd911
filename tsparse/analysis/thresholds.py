"""Sparsity by thresholds, without training: FAT-epsilon, CATS, TEAL and CETT, calibrated on other documents.

    method      zeroed where                              threshold                calibrated so that
    fat         |hidden| < epsilon                        one for the model        the model has the asked sparsity
    teal_down   |hidden| < epsilon                        one for each layer       each layer has it
    cats        |act(gate)| < epsilon                     one for each layer       each layer has it
    cett        |hidden_i| ||down_i|| < epsilon           one for each layer       each layer has the asked CETT

The thresholds are searched for with `probe`: a pass over the calibration text measures many of them at once, in every
layer of the model as it is, and the next pass measures where the asked values must lie between them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tsparse.activations import activation
from tsparse.analysis.masks import down_norms
from tsparse.analysis.probe import Observe, Seen, by_kind, probe
from tsparse.analysis.statistics import by_layer
from tsparse.data import EvaluationSet
from tsparse.evaluate.perplexity import Evaluation, evaluate_each
from tsparse.models.transformer import Transformer

Array = jax.Array
GRID = np.geomspace(1e-7, 1e3, 21)  # thresholds that the first pass measures; the others measure as many: one program
CETTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PPL_P = 1.0  # percent

DEFINITIONS = {
  "fat": "FAT-epsilon (ProSparse, arXiv 2402.13516, its threshold on the hidden): entries with |hidden| < epsilon are "
  "zeroed, one epsilon for the model. It is calibrated to give the target sparsity over all layers",
  "teal_down": "TEAL (arXiv 2408.14690) on the input of `down` alone, uniform over layers: entries with |hidden| < "
  "epsilon are zeroed, epsilon the target quantile of its layer. TEAL also thresholds the inputs of attention, gate "
  "and up, and divides the sparsity among the layers greedily: neither is done here",
  "cats": "CATS (arXiv 2404.08763): the hidden is zeroed where |act(gate)| < epsilon, the target quantile of its layer",
  "cett": "cumulative error of tail truncation (arXiv 2402.03804, 2411.02335): ||sum over dropped neurons of hidden_i "
  "down_i|| / ||FFN(x)||, dropped being those with |hidden_i| ||down_i|| < epsilon; the mean over tokens (over tokens "
  "and the experts they reach, shared ones included; 0 where FFN(x) is) in the model as it is. Each layer has the "
  "epsilon that gives its mean the one shared value",
  "ppl_p": "sparsity at the largest CETT whose perplexity is at most p% above that of the model as it is (CETT-PPL-p%, "
  "Sparsing Law, arXiv 2411.02335), found by bisection",
  "calibration": "documents that thresholds were found on; `held_out` if they are none of the evaluated ones",
  "threshold sparsity": "share of zeros in the hidden of the evaluated tokens under the threshold, those of the "
  "activation included",
}


# Interventions: `epsilon` has a leading axis of the layers of a kind of FFN, and a layer's slice is a scalar.


@struct.dataclass
class Magnitude:
  """Zeroes the entries with |hidden| < epsilon: FAT-epsilon, and TEAL on the input of `down`.

  Attributes:
    epsilon: [L] float32.
  """

  epsilon: Array

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    del gate, up, expert
    return jnp.where(hidden_size(hidden) >= self.epsilon, hidden, 0)


@struct.dataclass
class Cats:
  """Zeroes the entries with |act(gate)| < epsilon.

  Attributes:
    epsilon: [L] float32.
    act: name of the activation.
  """

  epsilon: Array
  act: str = struct.field(pytree_node=False)

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    del up, expert
    return jnp.where(gate_size(gate, self.act) >= self.epsilon, hidden, 0)


@struct.dataclass
class Contribution:
  """Zeroes the entries with |hidden_i| ||down_i|| < epsilon.

  Attributes:
    epsilon: [L] float32.
    norm: ||down_i||, [L, F] float32, with experts [L, E, F]: `masks.down_norms`.
  """

  epsilon: Array
  norm: Array

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    del gate, up
    norm = self.norm if expert is None else self.norm[expert]
    return jnp.where(hidden_size(hidden) * norm >= self.epsilon, hidden, 0)


def hidden_size(hidden: Array) -> Array:
  """|hidden| in float32."""
  return jnp.abs(hidden.astype(jnp.float32))


def gate_size(gate: Array, act: str) -> Array:
  """|act(gate)| in float32, act being what the activation makes of gate where up is 1: silu(gate) for swiglu."""
  return jnp.abs(activation(act)(gate, jnp.ones_like(gate)).astype(jnp.float32))


# What is measured at thresholds epsilon [G] of a layer: (sums [G, T], number of which they are the sums, [T]).


def hidden_below(seen: Seen, epsilon: Array) -> tuple[Array, Array]:
  """Entries with |hidden| < epsilon, and entries."""
  return _below(seen, hidden_size(seen.hidden), epsilon)


@dataclasses.dataclass(frozen=True)
class GateBelow:
  """Entries with |act(gate)| < epsilon, and entries.

  Attributes:
    act: name of the activation.
  """

  act: str

  def __call__(self, seen: Seen, epsilon: Array) -> tuple[Array, Array]:
    """Of each epsilon [G]: [G, T] and [T]."""
    return _below(seen, gate_size(seen.gate, self.act), epsilon)


def cett(seen: Seen, epsilon: Array) -> tuple[Array, Array]:
  """Sum of the CETT of tokens (each at each expert it reached), and their number."""
  hidden, down = seen.hidden.astype(jnp.float32), seen.down.astype(jnp.float32)
  contributions = jnp.abs(hidden) * jnp.linalg.norm(down, axis=-1)  # [B, T, E, F]

  def length(hidden):  # [B, T, E, F] -> ||hidden down||, [B, T, E]
    return jnp.linalg.norm(jnp.einsum("btef,efd->bted", hidden, down), axis=-1)

  whole = length(hidden)

  def at(epsilon):
    dropped = length(jnp.where(contributions < epsilon, hidden, 0))
    return jnp.sum(jnp.where(seen.reached & (whole > 0), dropped / whole, 0), axis=(0, 2))

  return jax.lax.map(at, epsilon), jnp.sum(seen.reached, axis=(0, 2), dtype=jnp.int32)


def _below(seen: Seen, size: Array, epsilon: Array) -> tuple[Array, Array]:
  entries = seen.count(jnp.ones(size.shape, bool))
  return jax.lax.map(lambda e: seen.count(size < e), epsilon), entries


# The search.


@dataclasses.dataclass(frozen=True)
class Curves:
  """What was measured at which thresholds, of each layer.

  Attributes:
    epsilon: [L, G], ascending.
    value: [L, G], not falling.
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
    """[L, targets]: thresholds that give the targets, by interpolation of log epsilon; the ends beyond the ends."""
    return np.exp([np.interp(targets, value, np.log(e)) for e, value in zip(self.epsilon, self.value, strict=True)])


def search(
  measure: Callable[[np.ndarray], np.ndarray], num_layers: int, targets: Sequence[float], passes: int = 5
) -> Curves:
  """Finds where a rising function of a threshold takes each of the targets, in every layer.

  Args:
    measure: epsilon [L, G] -> values [L, G]; one pass over the text.
    num_layers: L.
    targets: the values looked for.
    passes: at most so many after the first, until all targets are met to 0.001 or the thresholds stay the same (where
      the function jumps over a target).
  """
  epsilon = np.tile(GRID, (num_layers, 1))
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

  def curves(self, observe: Observe, targets: Sequence[float], together: bool = False) -> Curves:
    """`search` for the targets of what is observed at thresholds; `together` of all layers at once, at one epsilon."""

    def measure(epsilon):
      settings = jnp.asarray(epsilon, jnp.float32)
      total, number = by_layer(probe(self.model, self.params, self.batches, self.mesh, observe, settings).sums)
      total, number = total.sum(-1), number.sum(-1)[:, None]  # [L, G], [L, 1]
      if together:
        total, number = (np.broadcast_to(x.sum(0), x.shape) for x in (total, number))
      return total / number

    return search(measure, self.model.config.num_layers, targets)


def threshold_curves(
  model: Transformer,
  params: Any,
  data: EvaluationSet,
  mesh: jax.sharding.Mesh,
  natural: Evaluation,
  calibration: EvaluationSet,
  levels: Sequence[float],
  *,
  cetts: Sequence[float] = CETTS,
  percents: Sequence[float] = (PPL_P,),
  progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Sparsity, loss and perplexity under every method.

  Args:
    model: the decoder.
    params: its parameters.
    data: the text to evaluate on.
    mesh: the devices, set by `jax.set_mesh`.
    natural: the model as it is on `data`.
    calibration: the text to find thresholds on.
    levels: target sparsities of fat, teal_down and cats.
    cetts: target values of CETT.
    percents: p of CETT-PPL-p%.
    progress: called with a line after each method.

  Returns:
    By method a list of points with "sparsity", "loss", "perplexity": "fat" with "target" and "epsilon", "teal_down" and
    "cats" with "target" and "epsilon_per_layer", "cett" with "cett" and "epsilon_per_layer"; "ppl_p" as from `ppl_p`,
    and "calibration".
  """
  calibrator = Calibrator(model, params, calibration.batches, mesh)
  config, act, targets = model.config, model.config.activation, [level for level in levels if level > 0]
  norms = jax.jit(down_norms, static_argnums=0)(config, params)
  below = {"fat": hidden_below, "teal_down": hidden_below, "cats": GateBelow(act)}
  interventions = {
    "fat": lambda kind, epsilon: Magnitude(epsilon),
    "teal_down": lambda kind, epsilon: Magnitude(epsilon),
    "cats": lambda kind, epsilon: Cats(epsilon, act),
    "cett": lambda kind, epsilon: Contribution(epsilon, norms[kind]),
  }

  def masked(method: str, epsilons: np.ndarray) -> list[dict[str, float]]:
    """Points of the curve of a method at the thresholds [L, G]."""
    parts = [by_kind(jnp.asarray(epsilon, jnp.float32), config) for epsilon in epsilons.T]
    each = [{kind: interventions[method](kind, epsilon) for kind, epsilon in part.items()} for part in parts]
    found = evaluate_each(model, params, data.batches, mesh, each)
    return [{"sparsity": e.zero_fraction, "loss": e.loss, "perplexity": e.perplexity} for e in found]

  result = {
    "calibration": {
      "documents": calibration.documents,
      "tokens": calibration.tokens,
      "held_out": calibration is not data,
    }
  }
  for name, observe in below.items():
    result[name] = []
    if targets:
      epsilons = calibrator.curves(observe, targets, together=name == "fat").at(targets)  # [L, targets]
      for target, epsilon, point in zip(targets, epsilons.T, masked(name, epsilons), strict=True):
        where = {"epsilon": float(epsilon[0])} if name == "fat" else {"epsilon_per_layer": epsilon.tolist()}
        result[name].append({"target": target} | where | point)
    progress(name)
  curves = calibrator.curves(cett, cetts)

  def at(values: Sequence[float]) -> list[dict[str, Any]]:
    epsilons = curves.at(values)
    return [
      {"cett": value, "epsilon_per_layer": epsilon.tolist()} | point
      for value, epsilon, point in zip(values, epsilons.T, masked("cett", epsilons), strict=True)
    ]

  result["cett"] = at(cetts)
  progress("cett")
  result["ppl_p"] = [ppl_p(lambda value: at([value])[0], result["cett"], natural, percent) for percent in percents]
  progress("ppl_p")
  return result


def ppl_p(
  at: Callable[[float], dict[str, Any]],
  known: Sequence[dict[str, Any]],
  natural: Evaluation,
  percent: float,
  steps: int = 5,
) -> dict[str, Any]:
  """The largest CETT whose perplexity is at most `percent` above that of the model as it is, and its sparsity.

  Args:
    at: CETT -> point of the curve.
    known: points of it, by rising CETT, between two of which `steps` bisections look.
    natural: the model as it is, the point at CETT 0.
    percent: p.
    steps: how often the interval is halved.

  Returns:
    "p", "cett", "sparsity", "perplexity"; "at_least" is true where the largest known CETT is still good enough.
  """
  limit = natural.perplexity * (1 + percent / 100)
  best = {"cett": 0.0, "sparsity": natural.zero_fraction, "perplexity": natural.perplexity}
  bad = None
  for point in known:
    if point["perplexity"] > limit:
      bad = point["cett"]
      break
    best = point
  for _ in range(steps if bad is not None else 0):
    point = at((best["cett"] + bad) / 2)
    if point["perplexity"] <= limit:
      best = point
    else:
      bad = point["cett"]
  return {"p": percent, "at_least": bad is None} | {key: best[key] for key in ("cett", "sparsity", "perplexity")}
