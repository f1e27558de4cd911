"""Sparsity by thresholds, without training: FAT-epsilon, CATS, TEAL and CETT, calibrated on other documents.

    method      zeroed where                              threshold                calibrated so that
    fat         |hidden| < epsilon                        one for the model        the model has the asked sparsity
    teal        |x| < epsilon and |hidden| < epsilon'     one of each for an FFN   x and hidden of each FFN have it
    teal_down   |hidden| < epsilon                        one for each FFN         each FFN has it
    cats        |act(gate)| < epsilon                     one for each FFN         each FFN has it
    cett        |hidden_i| ||down_i|| < epsilon           one for each FFN         each FFN has the asked CETT

x is what gate and up read. With experts an FFN is one expert, on the tokens that reach it, and the shared expert of a
layer is another; x is that of a layer. How thresholds are found: calibration.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tsparse.activations import activation
from tsparse.analysis.calibration import Calibrator, FFNs, Measure
from tsparse.analysis.masks import down_norms
from tsparse.analysis.probe import Seen, probe
from tsparse.data import EvaluationSet
from tsparse.evaluate.perplexity import Evaluation, evaluate_each
from tsparse.models.counts import fired_and_entries
from tsparse.models.transformer import Transformer

Array = jax.Array
CETTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PPL_P = 1.0  # percent
BISECTIONS = 5  # for it

DEFINITIONS = {
  "fat": "FAT-epsilon (ProSparse, arXiv 2402.13516, its threshold on the hidden): entries with |hidden| < epsilon are "
  "zeroed, one epsilon for the model. It is calibrated to give the target sparsity over all layers",
  "teal": "TEAL (arXiv 2408.14690) in the FFNs, uniform: entries of the input of gate and up (one for both and for all "
  "experts of a layer; the router reads it whole) and of the input of `down` (the hidden) are zeroed where they are "
  "below epsilon, the target quantile of each of the two. Its sparsity is that of the weights: share of gate, up and "
  "down weights that meet a zero, (2 `input_zeros` + `hidden_zeros`) / 3. TEAL also thresholds the inputs of "
  "attention's matrices, and divides the sparsity among the matrices of a layer greedily: neither is done here",
  "teal_down": "the half of `teal` that is comparable with the others: the hidden alone is thresholded",
  "cats": "CATS (arXiv 2404.08763): the hidden is zeroed where |act(gate)| < epsilon, the target quantile of its FFN",
  "cett": "cumulative error of tail truncation (arXiv 2402.03804, 2411.02335): ||sum over dropped neurons of hidden_i "
  "down_i|| / ||FFN(x)||, dropped being those with |hidden_i| ||down_i|| < epsilon; the mean over the tokens that "
  "reach the FFN (0 where FFN(x) is) in the model as it is. Each FFN has the epsilon that gives its mean the one "
  "shared value",
  "ppl_p": "sparsity at the largest CETT whose perplexity is at most p% above that of the model as it is (CETT-PPL-p%, "
  "Sparsing Law, arXiv 2411.02335), found by bisection",
  "calibration": "documents that thresholds were found on, for each FFN its own: a dense one, each routed expert (one "
  "that no token reached: from the mean of its layer), a shared one; `held_out` if they are none of the evaluated ones",
  "threshold sparsity": "share of zeros in the hidden of the evaluated tokens under the threshold, those of the "
  "activation included; of `teal` see there. If zeros were known beforehand so much of the FFN weights need not be "
  "read. Without a predictor less: with top-k, fat, teal_down and cett `down` alone can skip them, with cats up and "
  "down, with teal all three",
}


# Interventions: `epsilon` has the leading axes of the layers of a kind of FFN and of its experts, [L, E]; a layer's
# slice is [E] (1 where it is dense), or without that axis a scalar.


def _of(epsilon: Array, expert: Array | None) -> Array:
  """What broadcasts with the hidden [..., F]."""
  return epsilon if expert is None or not jnp.ndim(epsilon) else epsilon[expert][..., None]


@struct.dataclass
class Magnitude:
  """Zeroes the entries with |hidden| < epsilon: FAT-epsilon, and TEAL on the input of `down`.

  Attributes:
    epsilon: [L, E] float32.
  """

  epsilon: Array

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    del gate, up
    return jnp.where(size(hidden) >= _of(self.epsilon, expert), hidden, 0)


@struct.dataclass
class Teal:
  """Zeroes the entries of what gate and up read with |x| < epsilon, and then those of the hidden by another threshold.

  Attributes:
    epsilon: [L, 1] float32.
    hidden: of the hidden.
  """

  epsilon: Array
  hidden: Magnitude

  def on_input(self, x: Array) -> Array:
    """Masked x [B, T, D]."""
    return jnp.where(size(x) >= self.epsilon, x, 0)

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    return self.hidden(gate, up, hidden, expert)


@struct.dataclass
class Cats:
  """Zeroes the entries with |act(gate)| < epsilon.

  Attributes:
    epsilon: [L, E] float32.
    act: name of the activation.
  """

  epsilon: Array
  act: str = struct.field(pytree_node=False)

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    del up
    return jnp.where(gate_size(gate, self.act) >= _of(self.epsilon, expert), hidden, 0)


@struct.dataclass
class Contribution:
  """Zeroes the entries with |hidden_i| ||down_i|| < epsilon.

  Attributes:
    epsilon: [L, E] float32.
    norm: ||down_i||, [L, F] float32, with experts [L, E, F]: `masks.down_norms`.
  """

  epsilon: Array
  norm: Array

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    del gate, up
    norm = self.norm if expert is None else self.norm[expert]
    return jnp.where(size(hidden) * norm >= _of(self.epsilon, expert), hidden, 0)


def size(x: Array) -> Array:
  """|x| in float32."""
  return jnp.abs(x.astype(jnp.float32))


def gate_size(gate: Array, act: str) -> Array:
  """|act(gate)| in float32, act being what the activation makes of gate where up is 1: silu(gate) for swiglu."""
  return jnp.abs(activation(act)(gate, jnp.ones_like(gate)).astype(jnp.float32))


# What is measured at thresholds epsilon [E, G] of a layer: (sums [E, G, ...], of how many they are the sums, [E, ...]),
# where ... are places in the row, or 1.


def hidden_below(seen: Seen, epsilon: Array) -> tuple[Array, Array]:
  """Entries with |hidden| < epsilon, and entries."""
  return _below(seen, size(seen.hidden), epsilon)


def input_below(seen: Seen, epsilon: Array) -> tuple[Array, Array]:
  """Entries with |x| < epsilon, and entries, of the real tokens: E is 1."""
  real = seen.reached.any(axis=2, keepdims=True)  # [B, T, 1]
  count = lambda mask: jnp.sum(mask & real, axis=(0, 2), dtype=jnp.int32)[None]  # noqa: E731
  below = jax.lax.map(lambda e: count(size(seen.x) < e), epsilon[0])  # [G, 1, T]
  return jnp.moveaxis(below, 0, 1), count(jnp.ones(seen.x.shape, bool))


def input_zeros(seen: Seen, settings: Any) -> tuple[Array, Array]:
  """Entries of x that are exactly zero, and entries, [T]."""
  del settings
  real = seen.reached.any(axis=2, keepdims=True)
  masks = seen.x == 0, jnp.ones(seen.x.shape, bool)
  return tuple(jnp.sum(mask & real, axis=(0, 2), dtype=jnp.int32) for mask in masks)


@dataclasses.dataclass(frozen=True)
class GateBelow:
  """Entries with |act(gate)| < epsilon, and entries.

  Attributes:
    act: name of the activation.
  """

  act: str

  def __call__(self, seen: Seen, epsilon: Array) -> tuple[Array, Array]:
    """Of each epsilon [E, G]: [E, G, ...] and [E, ...]."""
    return _below(seen, gate_size(seen.gate, self.act), epsilon)


def cett(seen: Seen, epsilon: Array) -> tuple[Array, Array]:
  """Sum of the CETT of the tokens that reached each expert, and their number."""
  contributions = size(seen.hidden) * jnp.linalg.norm(seen.down.astype(jnp.float32), axis=-1)  # [B, T, E, F]
  return dropped_error(seen, lambda epsilon: contributions >= epsilon[:, None], epsilon.T)


def rough_cett(seen: Seen, epsilon: Array) -> tuple[Array, Array]:
  """What `cett` would be if the rows of `down` were orthogonal, which takes one product for all epsilon, not one each:
  ||sum over dropped neurons of hidden_i down_i|| is then the root of the sum of (hidden_i ||down_i||)^2."""
  contributions = size(seen.hidden) * jnp.linalg.norm(seen.down.astype(jnp.float32), axis=-1)  # [B, T, E, F]
  whole = output_length(seen.hidden, seen.down)

  def at(e):
    dropped = jnp.sqrt(jnp.sum(jnp.square(contributions), axis=-1, where=contributions < e[:, None]))
    return jnp.sum(jnp.where(seen.reached & (whole > 0), dropped / whole, 0), axis=(0, 1))

  return jax.lax.map(at, epsilon.T).T[..., None], jnp.sum(seen.reached, axis=(0, 1), dtype=jnp.int32)[:, None]


def output_length(hidden: Array, down: Array) -> Array:
  """||hidden down|| in float32, [B, T, E], of hidden [B, T, E, F] and down [E, F, D]."""
  out = jnp.einsum("btef,efd->bted", hidden.astype(jnp.float32), down.astype(jnp.float32), precision="highest")
  return jnp.linalg.norm(out, axis=-1)


def dropped_error(seen: Seen, keep: Callable[[Array], Array], settings: Array) -> tuple[Array, Array]:
  """Sum over the tokens that reach each expert of ||sum over dropped neurons of hidden_i down_i|| / ||FFN(x)||.

  Args:
    seen: of a layer.
    keep: settings of a point -> which entries of the hidden are not dropped, [B, T, E, F].
    settings: [G, ...].

  Returns:
    [E, G, 1] float32, and [E, 1] int32, how many tokens.
  """
  whole = output_length(seen.hidden, seen.down)

  def at(setting):
    dropped = output_length(jnp.where(keep(setting), 0, seen.hidden), seen.down)
    return jnp.sum(jnp.where(seen.reached & (whole > 0), dropped / whole, 0), axis=(0, 1))

  return jax.lax.map(at, settings).T[..., None], jnp.sum(seen.reached, axis=(0, 1), dtype=jnp.int32)[:, None]


def _below(seen: Seen, size: Array, epsilon: Array) -> tuple[Array, Array]:
  entries = seen.count_each(jnp.ones(size.shape, bool))
  return jnp.moveaxis(jax.lax.map(lambda e: seen.count_each(size < e[:, None]), epsilon.T), 0, 1), entries


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
    levels: target sparsities of fat, teal, teal_down and cats.
    cetts: target values of CETT; none for neither "cett" nor "ppl_p".
    percents: p of CETT-PPL-p%.
    progress: called with a line after each method.

  Returns:
    By method a list of points with "sparsity", "loss", "perplexity" and what they are set by: "target", or "cett" of
    "cett"; and thresholds: "epsilon" of "fat", of the others as of `_stated`, "teal" with "input_epsilon_per_layer",
    "input_zeros" and "hidden_zeros" too. "ppl_p" as from `ppl_p`, and "calibration".
  """
  calibrator = Calibrator(model, params, calibration.batches, mesh)
  config, act, targets = model.config, model.config.activation, [level for level in levels if level > 0]
  norms = jax.jit(down_norms, static_argnums=0)(config, params)
  ffns, inputs = FFNs.of(config), FFNs.of(config, each_expert=False)
  measures = {
    "fat": Measure(hidden_below, ffns, together=True),
    "teal_down": Measure(hidden_below, ffns),
    "cats": Measure(GateBelow(act), ffns),
    "input": Measure(input_below, inputs),
  }
  interventions = {
    "fat": lambda kind, epsilon: Magnitude(epsilon),
    "teal_down": lambda kind, epsilon: Magnitude(epsilon),
    "cats": lambda kind, epsilon: Cats(epsilon, act),
    "cett": lambda kind, epsilon: Contribution(epsilon, norms[kind]),
  }
  traced = lambda ffns, row: {kind: jnp.asarray(e, jnp.float32) for kind, e in ffns.by_kind(row).items()}  # noqa: E731

  def masked(method: str, epsilons: np.ndarray) -> list[dict[str, float]]:
    """Points of the curve of a method at the thresholds [G, N]."""
    each = [{k: interventions[method](k, e) for k, e in traced(ffns, row).items()} for row in epsilons]
    found = evaluate_each(model, params, data.batches, mesh, each)
    return [{"sparsity": e.zero_fraction, "loss": e.loss, "perplexity": e.perplexity} for e in found]

  def teal(epsilon: np.ndarray, of_input: np.ndarray) -> dict[str, float]:
    """A point of TEAL at the thresholds [N] of the hidden and [N'] of the inputs."""
    hidden = traced(ffns, epsilon)
    each = {kind: Teal(e, Magnitude(hidden[kind])) for kind, e in traced(inputs, of_input).items()}
    found = probe(model, params, data.batches, mesh, input_zeros, intervention=each)
    evaluated = Evaluation(found.nll, found.tokens, found.real_tokens, found.counts)
    weights = {kind: fired_and_entries(counts)[1] for kind, counts in found.counts.items()}  # [L], in D
    shares = {kind: zeros.sum(-1) / entries.sum(-1) for kind, (zeros, entries) in found.sums.items()}
    zeros = sum((weights[kind] * share).sum() for kind, share in shares.items()) / sum(map(np.sum, weights.values()))
    return {
      "sparsity": float(2 * zeros + evaluated.zero_fraction) / 3,
      "input_zeros": float(zeros),
      "hidden_zeros": evaluated.zero_fraction,
      "loss": evaluated.loss,
      "perplexity": evaluated.perplexity,
    }

  result = {
    "calibration": {
      "documents": calibration.documents,
      "tokens": calibration.tokens,
      "held_out": calibration is not data,
    }
  }
  errors = {"cett": Measure(cett, ffns)} if cetts else {}
  rough = {"cett": Measure(rough_cett, ffns)} if cetts else {}
  shapes = calibrator.grid((measures if targets else {}) | rough) if targets or cetts else {}
  found = calibrator.thresholds(measures, targets, shapes) if targets else {}
  epsilons = {name: curves.at(targets).T for name, curves in found.items()}  # [targets, N]
  for name in ("fat", "teal_down", "cats"):
    result[name] = []
    for target, epsilon, point in (
      zip(targets, epsilons[name], masked(name, epsilons[name]), strict=True) if found else ()
    ):
      where = {"epsilon": float(epsilon[0])} if name == "fat" else _stated(ffns, epsilon)
      result[name].append({"target": target} | where | point)
    progress(name)
  result["teal"] = []
  for target, epsilon, read in zip(targets, epsilons["teal_down"], epsilons["input"], strict=True) if found else ():
    layers = [inputs.by_kind(read)[kind][:, 0] for kind in ("first", "ffn") if kind in inputs.shapes]
    where = {"input_epsilon_per_layer": np.concatenate(layers).tolist()}
    result["teal"].append({"target": target} | _stated(ffns, epsilon) | where | teal(epsilon, read))
  progress("teal")
  curves = calibrator.thresholds(errors, cetts, shapes)["cett"] if cetts else None

  def at(values: Sequence[float]) -> list[dict[str, Any]]:
    epsilons = curves.at(values).T
    return [
      {"cett": value} | _stated(ffns, epsilon) | point
      for value, epsilon, point in zip(values, epsilons, masked("cett", epsilons), strict=True)
    ]

  result["cett"] = at(cetts) if cetts else []
  progress("cett")
  percents = percents if cetts else ()
  result["ppl_p"] = [ppl_p(lambda value: at([value])[0], result["cett"], natural, percent) for percent in percents]
  progress("ppl_p")
  return result


def _stated(ffns: FFNs, epsilon: np.ndarray) -> dict[str, list]:
  """Thresholds [N] as JSON has them: "epsilon_per_layer", or with experts "epsilon_per_expert", a list for each layer
  (of one where it is dense), and "epsilon_shared" of the layers that have a shared one."""
  by_kind = {kind: e.tolist() for kind, e in ffns.by_kind(epsilon).items()}  # [L, E]
  layers = by_kind.get("first", []) + by_kind["ffn"]
  if all(len(layer) == 1 for layer in layers) and "shared" not in by_kind:
    return {"epsilon_per_layer": [epsilon for (epsilon,) in layers]}
  shared = {"epsilon_shared": [epsilon for (epsilon,) in by_kind["shared"]]} if "shared" in by_kind else {}
  return {"epsilon_per_expert": layers} | shared


def ppl_p(
  at: Callable[[float], dict[str, Any]],
  known: Sequence[dict[str, Any]],
  natural: Evaluation,
  percent: float,
  steps: int = BISECTIONS,
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
