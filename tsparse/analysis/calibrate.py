"""Thresholds of the hidden for a trained model, layer by layer, that make the asked share of zeros at the least loss.

How layers share the zeros: recipes/thresholds.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.analysis.calibration import Calibrator, FFNs, Measure
from tsparse.analysis.probe import Seen
from tsparse.analysis.thresholds import Magnitude, hidden_below
from tsparse.evaluate.perplexity import evaluate_each
from tsparse.models.counts import fired_and_entries
from tsparse.models.transformer import Transformer
from tsparse.recipes.thresholds import Calibrated, greedy

LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)
FINE = np.linspace(0.0, LEVELS[-1], 100)  # levels between those are interpolated
CORRECTIONS = 3  # zeros of one layer change those of the next: so often the target is corrected by what it missed


def layer_below(seen: Seen, epsilon: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Entries with |hidden| < epsilon and entries of all experts of a layer together: E is 1."""
  return tuple(x.sum(0, keepdims=True) for x in hidden_below(seen, epsilon))


def calibrate(
  model: Transformer,
  params: Any,
  batches: Sequence[dict[str, np.ndarray]],
  mesh: jax.sharding.Mesh,
  target: float,
  progress: Callable[[str], None] = lambda _: None,
) -> Calibrated:
  """The thresholds of every layer.

  Args:
    model: a decoder without thresholds.
    params: its parameters.
    batches: the text they are found on, all of one shape.
    mesh: the devices, set by `jax.set_mesh`.
    target: share of zeros of the whole hidden.
    progress: called with a line after each piece of work.
  """
  ffns = FFNs.of(model.config, each_expert=False)
  measures, calibrator = {"hidden": Measure(layer_below, ffns)}, Calibrator(model, params, batches, mesh)
  curves = calibrator.thresholds(measures, LEVELS, calibrator.grid(measures))["hidden"]
  progress("thresholds")

  def interventions(epsilon: np.ndarray) -> dict[str, Magnitude]:  # [N]
    return {kind: Magnitude(jnp.asarray(e, jnp.float32)) for kind, e in ffns.by_kind(epsilon).items()}

  def measured(each: Sequence[np.ndarray]) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Loss, zeros [N] and entries [N] under each of some thresholds [N]."""
    found = evaluate_each(model, params, batches, mesh, [interventions(epsilon) for epsilon in each])
    result = []
    for evaluation in found:
      parts = [fired_and_entries(evaluation.counts[kind]) for kind in ffns.shapes]
      fired, entries = (np.concatenate(part) for part in zip(*parts, strict=True))
      result.append((evaluation.loss, 1 - fired / entries, entries))
    return result

  number = ffns.number
  [(loss, natural, entries)] = measured([np.zeros(number)])
  epsilons = curves.at(LEVELS)  # [N, levels]
  costs, zeros = np.full((number, FINE.size), loss), np.repeat(natural[:, None], FINE.size, 1)
  for n in range(number):
    above = [g for g, level in enumerate(LEVELS) if level > natural[n]]
    alone = measured([np.where(np.arange(number) == n, epsilons[:, g], 0) for g in above])
    known = [natural[n], *(share[n] for _, share, _ in alone)]
    costs[n] = np.interp(FINE, known, [loss, *(cost for cost, _, _ in alone)])
    zeros[n] = np.clip(FINE, natural[n], max(known))
    progress(f"FFN {n}")

  weights, aim = entries / entries.sum(), target
  for _ in range(CORRECTIONS):
    at = greedy(costs, zeros, weights, aim)
    wanted = zeros[np.arange(number), at]
    fine = np.stack([curves.at([share])[n] for n, share in enumerate(wanted)])[:, 0]
    epsilon = np.where(wanted > natural, fine, 0.0)
    [(_, share, _)] = measured([epsilon])
    missed = target - weights @ share
    if abs(missed) < 0.002:
      break
    aim = min(aim + missed, LEVELS[-1])
  by_kind = {kind: of_kind[:, 0].astype(np.float32) for kind, of_kind in ffns.by_kind(epsilon).items()}
  return Calibrated(by_kind, share.tolist(), target)
