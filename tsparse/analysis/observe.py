"""What the analysis says of the hidden beyond its zeros and masks: from counts, from a probe, by thresholds."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from tsparse.analysis import experts, neurons, statistics, thresholds, unions
from tsparse.analysis.probe import by_kind, probe
from tsparse.data import EvaluationSet
from tsparse.errors import UserError
from tsparse.evaluate.perplexity import Evaluation
from tsparse.models.transformer import Transformer

Batches = Sequence[dict[str, np.ndarray]]

# What is made of a text; cost.py says what each costs. "experts" are masked one after the other only for those who ask.
PARTS = ("counts", "tokens", "thresholds", "experts")
DEFAULT_PARTS = ("counts", "tokens", "thresholds")

DEFINITIONS = {
  **statistics.DEFINITIONS,
  **experts.DEFINITIONS,
  **neurons.DEFINITIONS,
  **unions.DEFINITIONS,
  **thresholds.DEFINITIONS,
}


def observe(
  model: Transformer,
  params: Any,
  data: EvaluationSet,
  mesh: jax.sharding.Mesh,
  natural: Evaluation,
  *,
  parts: Collection[str] = DEFAULT_PARTS,
  calibration: EvaluationSet | None = None,
  levels: Sequence[float] = (),
  progress: Callable[[str], None] = lambda _: None,
  forwards: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Pieces of the model's entry in analysis.json.

  Args:
    model: the decoder.
    params: its parameters.
    data: held-out batches.
    mesh: the devices, set by `jax.set_mesh`.
    natural: the model as it is on `data`.
    parts: keys of PARTS.
    calibration: other documents to find thresholds on; None for the evaluated ones, which the result then says.
    levels: target sparsities of the thresholds.
    progress: called with the name of each piece of work after it, as cost.pieces has them, but "experts".
    forwards: called after each forward pass of "experts".

  Returns:
    By part: "neurons", "union" and, with experts, "experts"; then "per_position", "histograms" and more in "neurons",
    "union" and "experts"; then "thresholds"; then more in "experts".
  """
  found, masked = {}, [level for level in levels if level > 0]
  if "counts" in parts:
    found["neurons"] = neurons.neuron_statistics(natural.counts)
    found["union"] = {"batch": unions.batch_unions(natural, model.config)}
    if model.config.num_experts:
      found["experts"] = experts.expert_statistics(natural.counts, model.config)
  if "tokens" in parts:
    for name, piece in token_statistics(model, params, data.batches, mesh, natural, masked).items():
      found[name] = found.get(name, {}) | piece if isinstance(piece, dict) else piece
    progress("tokens")
  if "thresholds" in parts:
    found["thresholds"] = thresholds.threshold_curves(
      model, params, data, mesh, natural, calibration or data, levels, progress=progress
    )
  if "experts" in parts and model.config.num_experts and masked:
    curves = experts.masked_alone(model, params, data, mesh, masked, forwards)
    of_experts = found.setdefault("experts", {})
    of_experts["curves"] = {"levels": masked} | of_experts.get("curves", {}) | curves
  return found


def check_parts(names: Sequence[str]):
  """Raises UserError for a name that is no key of PARTS."""
  for name in names:
    if name not in PARTS:
      raise UserError(f"--parts={','.join(names)}: {name!r} is unknown, choose of {', '.join(PARTS)}.")


def token_statistics(
  model: Transformer,
  params: Any,
  batches: Batches,
  mesh: jax.sharding.Mesh,
  natural: Evaluation,
  levels: Sequence[float] = (),
) -> dict[str, Any]:
  """What needs a look at every token: "per_position", "histograms", and parts of "neurons", "union" and "experts".

  The curves of the experts are at the `levels`. The two halves of the batches are looked at one after the other, which
  says how stable the hot neurons are; a single batch has none.
  """
  layers = model.config.num_layers
  everywhere = lambda x: np.tile(x, (layers, 1))  # noqa: E731
  magnitudes = by_kind(everywhere(statistics.MAGNITUDES), model.config)
  first = probe(model, params, batches[:1], mesh, statistics.magnitudes, magnitudes)
  edges, chosen = statistics.histogram_edges(first), neurons.sample(natural.counts)
  curves = bool(levels) and bool(model.config.num_experts)
  together = statistics.Together((
    ("positions", statistics.zeros_by_position),
    ("histograms", statistics.histograms),
    ("windows", unions.Windows()),
    ("coactivation", neurons.coactivation),
    *([("errors", experts.topk_errors)] if curves else []),
  ))  # fmt: skip
  settings = {"histograms": everywhere(edges), "coactivation": chosen}
  settings |= {"errors": everywhere(np.asarray(levels, np.float32))} if curves else {}
  settings = by_kind(settings, model.config)
  middle = len(batches) // 2
  halves = [probe(model, params, b, mesh, together, settings) for b in (batches[:middle], batches[middle:]) if b]
  probed = halves[0] if len(halves) == 1 else halves[0] + halves[1]
  sums = {name: {kind: s[name] for kind, s in probed.sums.items()} for name, _ in together.parts}
  pairs = neurons.coactivation_statistics(sums["coactivation"], chosen, probed.real_tokens)
  stable = {"stability": neurons.stability(*(half.counts for half in halves))} if len(halves) == 2 else {}
  return {
    "per_position": statistics.zero_fraction_per_position(sums["positions"]),
    "histograms": statistics.histogram_shares(sums["histograms"], edges),
    "neurons": {"coactivation": pairs} | stable,
    "union": {"window": unions.window_unions(probed, sums["windows"], model.config)},
    **({"experts": {"curves": experts.error_curves(sums["errors"], levels)}} if curves else {}),
  }
