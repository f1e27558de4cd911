"""The analysis of one model on one held-out text: a plain dict, as analysis.json stores it with stable keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tsparse.analysis import masks
from tsparse.data import EvaluationSet, accounting
from tsparse.evaluate import perplexity
from tsparse.evaluate.perplexity import Evaluation, evaluate
from tsparse.models import counts
from tsparse.models.config import ACTIVATED_DEFINITION, activated_parameters, parameter_counts
from tsparse.models.transformer import Transformer

DEFINITIONS = {
  **perplexity.DEFINITIONS,
  **counts.DEFINITIONS,
  **masks.DEFINITIONS,
  **accounting.DEFINITIONS,
  "activated": ACTIVATED_DEFINITION,
  "tokens_seen": "tokens that tsparse trained the model on, the checkpoints it started from included; what a model "
  "from elsewhere saw before is not known and not counted",
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
  trained_tokens: int,
  levels: Sequence[float] = (),
  by_source: Mapping[str, EvaluationSet] | None = None,
  progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Loss, natural sparsity and the masked-perplexity curve of a model.

  Args:
    name: what the report calls it.
    model: the decoder.
    params: its parameters.
    data: held-out batches.
    mesh: the devices, set by `jax.set_mesh`.
    source: where the model is stored.
    text: what the held-out text is.
    trained_tokens: tokens it was trained on so far.
    levels: sparsities in [0, 1) of the curve; none leaves the curve empty.
    by_source: held-out batches of each source of a mixture.
    progress: called with a line after each piece of work.

  Returns:
    An entry of "models" in analysis.json.
  """
  natural = evaluate(model, params, data.batches, mesh)
  progress(f"{name}: natural sparsity")
  curve = []
  for level in levels:
    mask = masks.topk_everywhere(level, model.config.num_layers)
    masked = evaluate(model, params, data.batches, mesh, mask)  # the level is traced: one compilation for all
    curve.append({"sparsity": level, "loss": masked.loss, "perplexity": masked.perplexity})
    progress(f"{name}: {level:.0%} of the hidden masked")
  sources = []
  for each, held_out in (by_source or {}).items():
    found = evaluate(model, params, held_out.batches, mesh)
    quality = {"loss": found.loss, "perplexity": found.perplexity, "zero_fraction": found.zero_fraction}
    sources.append({"name": each, **quality, "tokens": found.tokens, "documents": held_out.documents})
  return {
    "name": name,
    "model": source,
    "activation": model.config.activation,
    "data": text,
    "vocabulary": data.vocabulary,
    "eos": data.eos,
    "documents": data.documents,
    "tokens": natural.tokens,
    "trained_tokens": trained_tokens,
    "loss": natural.loss,
    "perplexity": natural.perplexity,
    **hidden_statistics(natural),
    "curve": curve,
    "sources": sources,
    "parameters": {
      "total": sum(parameter_counts(model.config).values()),
      "activated": activated_parameters(
        model.config, {kind: float(counts.mean_zero_fraction(c)) for kind, c in natural.counts.items()}
      ),
      "definition": ACTIVATED_DEFINITION,
    },
  }


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
