"""Predictors for a stored model, from its text to a folder beside it: `experiments/predictors.py` calls `run`."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from tsparse import files, sharding, workdir
from tsparse.activations import activation
from tsparse.analysis.probe import probe
from tsparse.analysis.run import check_fits
from tsparse.convert.model import Model, open_model
from tsparse.data import DataSettings, EvaluationSet, check_data, check_disjoint, evaluation_batches, train_iterator
from tsparse.errors import UserError
from tsparse.evaluate import perplexity
from tsparse.evaluate.perplexity import evaluate
from tsparse.models import counts
from tsparse.models.config import ModelConfig
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.progress import ProgressLine
from tsparse.sparse.generate import dense_for
from tsparse.sparse.predictors import fit, quality, report, stored
from tsparse.train import checkpoint

SURVEYED, CALIBRATED = 2, 16  # batches that ranks, and thresholds, are chosen on
RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)  # targets that perplexity is measured at, beside the one asked for
DEFINITIONS = {**fit.DEFINITIONS, **quality.DEFINITIONS, **perplexity.DEFINITIONS, **counts.DEFINITIONS}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Predictors that are measured.

  Attributes:
    name: a key of report.LABELS.
    source: what they read, one of fit.INPUTS.
    ranks: of each layer, as they are counted (an SVD's lie twice as wide).
    weights: fc1 and fc2, as models/transformer.py lays them out.
    thresholds: [L, E] float32, given with them; None if they are chosen by recall.
  """

  name: str
  source: str
  ranks: tuple[int, ...]
  weights: Mapping[str, Any]
  thresholds: np.ndarray | None = None


def run(
  path: Path,
  data: str,
  out: Path | None = None,
  *,
  validation: str = "",
  source: str = "before_norm",
  budget: float = 0.12,
  recall: float = 0.95,
  steps: int = 500,
  learning_rate: float | None = None,
  seq_len: int | None = None,
  batch_size: int = 16,
  tokens: int = 32_768,
  seed: int = 0,
  root: str = "",
  text_field: str = "text",
  bos: str = "auto",
  console: Console | None = None,
) -> dict[str, Any]:
  """Trains neuron predictors for a model, measures them beside an SVD's, and writes both findings and predictors.

  Args:
    path: a workdir of ours or a Hugging Face directory.
    data: a D to train on.
    out: the folder to write, which must not exist or be empty; None for `predictors` beside the model.
    validation: a D to measure on; "" for what `data` holds out.
    source: what the trained ones read, one of fit.INPUTS.
    budget: share of the FFN's weights that they hold, see fit.DEFINITIONS.
    recall: that thresholds are chosen for.
    steps: batches that are trained on.
    learning_rate: of training, its peak; None for 0.08 / sqrt(D), 0.01 at D = 64 and 0.00125 at D = 4096.
    seq_len: tokens of a row; None for the model's own (`Model.row`).
    batch_size: rows of a batch.
    tokens: so many are measured on, or all of a shorter text; the document that does not fit the rest of them is cut.
    seed: of the order of the text and of the initial weights.
    root: folder or bucket with the sources of a mixture.
    text_field: of files, that holds the text.
    bos: whether documents begin with BOS, "on" or "off"; "auto" as the model was trained with, or its tokenizer does.
    console: where progress and tables are printed.

  Returns:
    The content of quality.json.

  Raises:
    UserError: something of the above cannot be; nothing was written.
    RunFailure: training diverged, or the disk failed.
  """
  console = console or Console()
  out = out or path / stored.FOLDER
  _check(source, budget, recall, 1.0 if learning_rate is None else learning_rate)
  files.check_new(out)
  model = open_model(path)
  config = _trainable(model)
  seq_len = seq_len or model.row
  if seq_len > config.max_seq_len:
    raise UserError(f"--seq_len={seq_len} is more than the {config.max_seq_len} tokens of the model: lower it.")
  learning_rate = learning_rate or 0.08 / config.d_model**0.5
  batch_size = sharding.evaluation_rows(batch_size)
  mesh = sharding.evaluation_mesh([config.d_model])
  check_fits(model, mesh)
  settings = DataSettings(
    train=data, validation=validation, vocabulary=model.vocabulary, eos=model.eos, root=root, text_field=text_field,
    bos=model.bos if bos == "auto" else bos, embedded=config.vocab_size,
  )  # fmt: skip
  sizes = {"seq_len": seq_len, "batch_size": batch_size}
  with console.status("reading the data"):
    check_data(settings, config.vocab_size)
    held_out = evaluation_batches(settings, max_tokens=tokens, **sizes)
    batches = train_iterator(settings, seed=seed, **sizes)
  leak = check_disjoint(settings)
  for line in filter(None, (f"{validation or data}: {held_out.size}", leak and leak.sentence)):
    console.print(f"held-out text  {line}", highlight=False, soft_wrap=True)
  targets = sorted({*RECALLS, recall})
  total = steps + 2 + len(held_out.batches) * (1 + 2 * len(targets) + bool(model.config.predictor_ranks))

  with files.new_folder(out) as folder, jax.set_mesh(mesh), ProgressLine(console, "predictors", 0, total) as bar:
    base, params = Transformer(config), _parameters(model, mesh)
    merged = params["layers"]["ffn"].pop("predictor", None)
    first = list(itertools.islice(batches, SURVEYED))
    survey = fit.survey(base, params, first, mesh)
    ranks = fit.choose_ranks(survey.zeros, config, budget)
    weights, losses = fit.train(
      base, params, itertools.chain(first, batches), mesh, survey, ranks, source,
      steps=steps, learning_rate=learning_rate, seed=seed, progress=bar.advance,
    )  # fmt: skip
    svd = fit.svd_of_gate(np.asarray(params["layers"]["ffn"]["gate"]), ranks, survey.rms["gate"])
    candidates = [Candidate("trained", source, ranks, weights), Candidate("svd", "after_norm", ranks, svd)]
    if merged is not None:
      candidates.append(merged_candidate(model.config, merged))
    calibration = histograms(base, params, itertools.islice(batches, CALIBRATED), mesh, candidates)
    bar.advance("thresholds")
    measured = histograms(base, params, held_out.batches, mesh, candidates)
    bar.advance("recall and precision")
    natural = evaluate(base, params, held_out.batches, mesh)
    bar.advance("perplexity", len(held_out.batches))

    def measure(candidate: Candidate, target: float | None) -> dict[str, Any]:
      """The candidate with thresholds for a recall, or its own."""
      counted, name = calibration[candidate.name], candidate.name
      thresholds = candidate.thresholds if target is None else quality.choose_thresholds(counted, target)
      held = np.array(candidate.ranks) * (config.d_model + config.d_ff)
      masked = masked_perplexity(config, params, candidate, thresholds, held_out, mesh)
      bar.advance(f"perplexity, {name}", len(held_out.batches))
      rates = quality.quality(measured[name], thresholds, config, held)
      loss = {"loss": masked.loss, "perplexity": masked.perplexity, "zero_fraction": masked.zero_fraction}
      return {"target": target, "thresholds": thresholds, **rates, **loss}

    found = []
    for candidate in candidates:
      curve = [] if candidate.thresholds is not None else [measure(candidate, target) for target in targets]
      asked = curve[targets.index(recall)] if curve else measure(candidate, None)
      short = ("target", "recall", "precision", "predicted_sparsity", "loss", "perplexity")
      facts = {"name": candidate.name, "input": candidate.source, "ranks": candidate.ranks}
      lines = {
        "curve": [{name: point[name] for name in short} for point in curve],
        "tradeoff": quality.tradeoff(measured[candidate.name], np.linspace(0.5, 1, 51)),
      }
      found.append(facts | asked | lines)
    asked = found[0]
    wide = stored.with_predictors(config, ranks, source)
    weights = jax.tree.map(np.asarray, weights) | {"threshold": _shaped(config, asked["thresholds"])}
    stored.save(folder, model, wide, weights, {"recall": recall, "read": asked["read"], "trained_on": data})
    result = {
      "model": str(path),
      "data": data,
      "tokens": held_out.tokens,
      "documents": held_out.documents,
      "documents_cut": held_out.cut,
      "note": held_out.note,
      "leakage": leak and leak.facts(),
      "split": held_out.split,
      "bos": held_out.bos,
      "target_recall": recall,
      "budget": budget,
      "bytes_per_weight": model.leaves()[0][stored.GATE].dtype.itemsize,
      "training": {
        "steps": steps,
        "tokens": steps * seq_len * batch_size,
        "learning_rate": learning_rate,
        "loss": losses,
      },
      "natural": {
        "loss": natural.loss,
        "perplexity": natural.perplexity,
        "zero_fraction": natural.zero_fraction,
        "zeros_per_layer": counts.zero_fraction_per_layer(natural.counts),
      },
      "predictors": found,
      "definitions": DEFINITIONS,
      **workdir.environment(),
    }
    report.write(result, folder)
  report.show(result, console)
  console.print(f"predictors  {out}", highlight=False, soft_wrap=True)
  return files.strict(result)


def histograms(
  model: Transformer, params: Any, batches: Iterable, mesh: jax.sharding.Mesh, candidates: Sequence[Candidate]
) -> dict[str, np.ndarray]:
  """[L, E, kinds, bins] of the logits of each candidate, by name, over some text."""
  observe = quality.Histograms(model.config.activation, tuple((c.name, c.source) for c in candidates))
  settings = {c.name: jax.tree.map(jnp.asarray, dict(c.weights)) for c in candidates}
  return probe(model, params, list(batches), mesh, observe, {"ffn": settings}).sums["ffn"]


def masked_perplexity(
  config: ModelConfig,
  params: Any,
  candidate: Candidate,
  thresholds: np.ndarray,
  data: EvaluationSet,
  mesh: jax.sharding.Mesh,
) -> perplexity.Evaluation:
  """The model with the candidate in it; other thresholds compile nothing new."""
  ranks = (candidate.weights["fc1"].shape[-1],) * config.num_layers  # as wide as they lie
  wide = stored.with_predictors(config, ranks, candidate.source)
  predictor = {**candidate.weights, "threshold": _shaped(config, thresholds)}
  ffn = params["layers"]["ffn"] | {"predictor": jax.tree.map(jnp.asarray, predictor)}
  inside = params | {"layers": params["layers"] | {"ffn": ffn}}
  return evaluate(Transformer(wide), inside, data.batches, mesh)


def _shaped(config: ModelConfig, thresholds: np.ndarray) -> np.ndarray:
  """[L, E] as models/transformer.py lays thresholds out."""
  return thresholds if config.num_experts else thresholds[:, 0]


def merged_candidate(config: ModelConfig, predictor: Mapping[str, Any]) -> Candidate:
  """The predictors that the model came with."""
  thresholds = np.zeros((config.num_layers, max(1, config.num_experts)), np.float32)
  weights = {name: predictor[name] for name in ("fc1", "fc2")}
  return Candidate("merged", config.predictor_input, config.predictor_ranks, weights, thresholds)


def _parameters(model: Model, mesh: jax.sharding.Mesh) -> Any:
  shapes, logical = abstract_parameters(Transformer(model.config))
  return model.restore(checkpoint.abstract(shapes, sharding.shardings(mesh, logical)))[0]


def _trainable(model: Model) -> ModelConfig:
  """The model without predictors; UserError where none can be made for it."""
  config = stored.without_predictors(model.config)
  if not activation(config.activation).exact_zeros:
    raise UserError(
      f"{model.path} has the activation {config.activation}, whose hidden is exactly zero nowhere, so that there is "
      "nothing to predict: make it dReLU first (configs/relufy.py)."
    )
  if reason := dense_for(config):
    raise UserError(
      f"{model.path} has {reason}, which the kernels that read predictors do not know: it is decoded densely, and "
      "predictors would not make it faster."
    )
  if config.dense_layers or config.num_shared_experts:
    raise UserError(
      f"{model.path} has dense first layers or shared experts beside its routed ones, and predictors are for models "
      "whose FFNs are all alike: use --sparse=exact with it."
    )
  return config


def _check(source: str, budget: float, recall: float, learning_rate: float):
  if source not in fit.INPUTS:
    raise UserError(f"--input={source} is unknown: choose one of {', '.join(fit.INPUTS)}.")
  for name, value in (("budget", budget), ("recall", recall)):
    if not 0 < value < 1:
      raise UserError(f"--{name}={value} is not a share: give a number between 0 and 1.")
  if not 0 < learning_rate < math.inf:
    raise UserError(f"--learning_rate={learning_rate} must be a positive number.")
