"""The analysis of one model on one held-out text: a plain dict, as analysis.json stores it with stable keys."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tsparse.analysis import accounting, confidence, experts, gap, masks, neurons, observe
from tsparse.analysis.cost import pieces
from tsparse.analysis.curves import masked_curves
from tsparse.analysis.probe import check_finite
from tsparse.data import EvaluationSet, leakage
from tsparse.data import accounting as data_accounting
from tsparse.evaluate import perplexity
from tsparse.evaluate.perplexity import Evaluation, evaluate_each
from tsparse.models import counts
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
  progress: Callable[[str, float], None] = lambda *_: None,
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
    progress: called with a line and the cost of what was done (cost.py), in plain forward passes over a batch.

  Returns:
    An entry of "models" in analysis.json.

  Raises:
    UserError: the model's logits are not finite.
  """
  config, norms = model.config, None
  costs = pieces(config, data.batches[0]["targets"].shape[1], levels, selections, parts)

  def step(amount: float = 1.0):
    progress(name, amount)

  def done(piece: str):
    sizes = len(data.batches), len((calibration or data).batches)
    progress(f"{name}: {piece}", costs[piece].batches(*sizes))

  if levels and "contribution" in selections:
    norms = jax.jit(masks.down_norms, static_argnums=0)(config, params)
  documents = data.document_ids, data.documents
  [natural] = evaluate_each(model, params, data.batches, mesh, [None], step, *documents)
  if not np.isfinite(natural.nll):
    check_finite(model, params, data.batches, mesh)
  keep(natural.counts)
  number = len([level for level in levels if level > 0]) * len(selections)
  curves = masked_curves(
    model, params, data.batches, mesh, natural, levels, selections, norms, mask_shared,
    lambda: step(costs["masks"].text / number),
  )  # fmt: skip
  statistics, number = hidden_statistics(natural), len(list(experts.alone(config, [s for s in levels if s > 0])))
  observed = observe.observe(
    model, params, data, mesh, natural, parts=parts, calibration=calibration, levels=levels, progress=done,
    forwards=lambda: step(costs["experts"].text / number),
  )  # fmt: skip
  others = {
    text: natural if held_out is data else evaluate_each(model, params, held_out.batches, mesh, [None], step)[0]
    for text, held_out in (by_source or {}).items()
  }
  if "neurons" in observed and len(others) > 1:
    observed["neurons"]["between"] = neurons.between({text: found.counts for text, found in others.items()})
  statistics["zero_fraction"] |= {"per_position": observed.pop("per_position")} if "per_position" in observed else {}
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
