"""The analysis of one model on one held-out text: a plain dict, as analysis.json stores it with stable keys."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tsparse.analysis import accounting, confidence, experts, gap, masks, neurons, observe
from tsparse.analysis.probe import check_finite
from tsparse.data import EvaluationSet, leakage
from tsparse.data import accounting as data_accounting
from tsparse.evaluate import perplexity
from tsparse.evaluate.perplexity import Evaluation, evaluate, evaluate_each
from tsparse.models import counts
from tsparse.models.config import ModelConfig
from tsparse.models.counts import ModelCounts
from tsparse.models.transformer import Transformer

DEFINITIONS = {
  **perplexity.DEFINITIONS,
  **counts.DEFINITIONS,
  **masks.DEFINITIONS,
  **confidence.DEFINITIONS,
  **gap.DEFINITIONS,
  **accounting.DEFINITIONS,
  **observe.DEFINITIONS,
  **data_accounting.DEFINITIONS,
  **leakage.DEFINITIONS,
  "tokens_seen": "tokens that tsparse trained the model on, the checkpoints it started from included; what a model "
  "from elsewhere saw before is not known and not counted, and one that was only trained elsewhere is unknown",
}


def analyze(
  name: str,
  model: Transformer,
  params: Any,
  data: EvaluationSet,
  mesh: jax.sharding.Mesh,
  *,
  source: str,
  text: str,
  trained_tokens: int | None,
  levels: Sequence[float] = (),
  selections: Sequence[str] = ("hidden",),
  mask_shared: bool = False,
  parts: Collection[str] = ("counts",),
  calibration: EvaluationSet | None = None,
  by_source: Mapping[str, EvaluationSet] | None = None,
  keep: Callable[[ModelCounts], None] = lambda _: None,
  progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Loss, natural sparsity and the masked-perplexity curves of a model.

  Args:
    name: what the report calls it.
    model: the decoder.
    params: its parameters.
    data: held-out batches.
    mesh: the devices, set by `jax.set_mesh`.
    source: where the model is stored.
    text: what the held-out text is.
    trained_tokens: tokens that tsparse trained it on so far; None where it did not, and nobody knows.
    levels: sparsities in [0, 1) of the curves; none leaves them empty.
    selections: a curve for each, keys of masks.SELECTIONS; "curve" is that of "hidden".
    mask_shared: mask shared experts too.
    parts: of what is beyond zeros and masks, some of observe.PARTS.
    calibration: other documents, to find thresholds on; None for the same.
    by_source: held-out batches of other texts, such as each source of a mixture; one may be `data`.
    keep: called with the counts of every neuron.
    progress: called with a line after each forward pass and then each piece of work: `passes` of them.

  Returns:
    An entry of "models" in analysis.json.

  Raises:
    UserError: the model's logits are not finite.
  """
  config, norms = model.config, None
  if levels and "contribution" in selections:
    norms = jax.jit(masks.down_norms, static_argnums=0)(config, params)
  masked = [
    masks.topk_everywhere(level, config, norms if selection == "contribution" else None, selection, mask_shared)
    for selection in selections
    for level in levels
  ]
  step, documents = (lambda: progress(name)), (data.document_ids, data.documents)
  natural, *results = evaluate_each(model, params, data.batches, mesh, [None, *masked], step, *documents)
  if not np.isfinite(natural.nll):
    check_finite(model, params, data.batches, mesh)
  keep(natural.counts)
  statistics, note = hidden_statistics(natural), lambda piece: progress(f"{name}: {piece}")
  observed = observe.observe(
    model, params, data, mesh, natural, parts=parts, calibration=calibration, levels=levels, progress=note
  )
  others = {
    text: natural if held_out is data else evaluate(model, params, held_out.batches, mesh)
    for text, held_out in (by_source or {}).items()
  }
  if "neurons" in observed and len(others) > 1:
    observed["neurons"]["between"] = neurons.between({text: found.counts for text, found in others.items()})
  statistics["zero_fraction"] |= {"per_position": observed.pop("per_position")} if "per_position" in observed else {}
  points = iter(results)
  curves = [
    {
      "selection": selection,
      "points": [{"sparsity": s, "loss": (r := next(points)).loss, "perplexity": r.perplexity} for s in levels],
    }
    for selection in selections
    if levels
  ]
  return {
    "name": name,
    "model": source,
    "activation": config.activation,
    "data": text,
    "vocabulary": data.vocabulary,
    "eos": data.eos,
    "bos": data.bos,
    "documents": data.documents,
    "documents_cut": data.cut,
    "tokens": natural.tokens,
    "real_tokens": natural.real_tokens,
    "note": data.note,
    "trained_tokens": trained_tokens,
    "loss": natural.loss,
    "perplexity": natural.perplexity,
    **statistics,
    **observed,
    "curve": next((curve["points"] for curve in curves if curve["selection"] == "hidden"), []),
    "curves": curves,
    "mask_shared": mask_shared,
    "sources": [quality_on(text, found, by_source[text]) for text, found in others.items()],
    "confidence": confidence.confidence(natural.documents),
    "per_document": confidence.per_document(natural.documents),
    **accounting.accounting(config, zero_fractions(natural), data.batches[0]["targets"].shape[1]),
  }


def quality_on(name: str, found: Evaluation, held_out: EvaluationSet) -> dict[str, Any]:
  """An entry of "sources": loss and zeros on another text, such as what one source of a mixture holds out."""
  quality = {"loss": found.loss, "perplexity": found.perplexity, "zero_fraction": found.zero_fraction}
  tokens = {"tokens": found.tokens, "real_tokens": found.real_tokens}
  documents = {"documents": held_out.documents, "documents_cut": held_out.cut}
  return {"name": name, **quality, **tokens, **documents, "note": held_out.note}


def passes(
  config: ModelConfig,
  data: EvaluationSet,
  levels: Sequence[float],
  selections: Sequence[str],
  parts: Collection[str] = ("counts",),
) -> int:
  """Forward passes of an analysis, and pieces of work after them."""
  forwards = 1 + len(levels) * len(selections)
  if "experts" in parts and config.num_experts:
    forwards += len(list(experts.alone(config, [level for level in levels if level > 0])))
  return len(data.batches) * forwards + sum(observe.PARTS[part] for part in parts)


def zero_fractions(natural: Evaluation) -> dict[str, float]:
  """Zero fraction by kind of FFN."""
  return {kind: float(counts.mean_zero_fraction(c)) for kind, c in natural.counts.items()}


def hidden_statistics(natural: Evaluation) -> dict[str, Any]:
  """Zero fractions and dead neurons, whole, by layer and by expert; a dense layer has one expert."""
  by_kind = natural.counts
  in_order = [by_kind[kind] for kind in ("first", "ffn") if kind in by_kind]  # they make up the layers
  dead = np.concatenate([counts.dead_neurons(c).sum(axis=1) for c in in_order])  # [L]
  with np.errstate(invalid="ignore"):  # NaN for an expert that no token reached
    per_expert = [layer for c in in_order for layer in counts.zero_fraction(c).tolist()]
  zeros = {
    "mean": natural.zero_fraction,
    "per_layer": counts.zero_fraction_per_layer(by_kind).tolist(),
    "per_expert": per_expert,
  }
  if "shared" in by_kind:
    shared = by_kind["shared"]
    dead[-len(shared.fired) :] += counts.dead_neurons(shared)[:, 0]
    zeros["shared_per_layer"] = counts.zero_fraction(shared)[:, 0].tolist()  # of the layers that have experts
  return {
    "zero_fraction": zeros,
    "dead_neurons": {
      "count": int(dead.sum()),
      "total": sum(int(np.prod(c.fired.shape)) for c in by_kind.values()),
      "per_layer": dead.tolist(),
    },
  }
