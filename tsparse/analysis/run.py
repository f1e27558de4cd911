"""Analyses of stored models: `experiments/analyze.py` calls `run`, and an experiment ends with `analyze_cases`."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from tsparse import files, sharding, workdir
from tsparse.analysis import budget, confidence, neurons
from tsparse.analysis.analyze import DEFINITIONS, analyze
from tsparse.analysis.masks import check_selections
from tsparse.analysis.observe import DEFAULT_PARTS, check_parts
from tsparse.analysis.report import print_table, write_report
from tsparse.convert.model import Model, open_model
from tsparse.data import (
  DataSettings,
  EvaluationSet,
  NoText,
  check_embedded,
  evaluation_batches,
  evaluation_by_source,
  first_token,
  load_tokenizer,
  same_tokenizer,
)
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, parameter_counts
from tsparse.models.counts import ModelCounts
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.progress import ProgressLine
from tsparse.train import checkpoint, memory
from tsparse.train.log import final_loss

CALIBRATION_TOKENS = 8192  # that thresholds are found on


@dataclasses.dataclass(frozen=True)
class Case:
  """A stored model to analyse.

  Attributes:
    name: what the report calls it.
    stored: where its parameters are.
    config: what to make of them; the activation may be another than the stored one.
    data: batches to evaluate on, in its own vocabulary.
    text: what the report says of that text.
    levels: sparsities of the masked-perplexity curves.
    selections: what the curves' masks keep, keys of masks.SELECTIONS.
    mask_shared: mask shared experts too.
    parts: of what is beyond zeros and masks, keys of observe.PARTS.
    calibration: other documents to find thresholds on, None if there are none.
    by_source: the same as `data` for each source of a mixture.
    keep: called with the counts of every neuron.
  """

  name: str
  stored: Model
  config: ModelConfig
  data: EvaluationSet
  text: str
  levels: Sequence[float]
  selections: Sequence[str] = ("hidden",)
  mask_shared: bool = False
  parts: Sequence[str] = ("counts",)
  calibration: EvaluationSet | None = None
  by_source: Mapping[str, EvaluationSet] = dataclasses.field(default_factory=dict)
  keep: Callable[[ModelCounts], None] = lambda _: None


def analyze_cases(
  cases: Sequence[Case], mesh: jax.sharding.Mesh, console: Console, minutes: float = 0.0, record: Path | None = None
) -> dict[str, Any]:
  """The content of analysis.json; `mesh` is set by `jax.set_mesh`, and one model at a time is in memory.

  `minutes` and `record` limit how much of the texts is evaluated: see `budget.fitted`.
  """
  restored = _restore(cases[0], mesh)
  with console.status("timing a forward pass"):
    speed = budget.measured(Transformer(cases[0].config), restored[0], cases[0].data.batches[0], mesh)
  cases, limited = budget.fitted(cases, speed, minutes, record)
  total, tokens = sum(map(budget.forwards, cases)), cases[0].data.tokens
  passes, took = total / len(cases[0].data.batches), sum(budget.seconds(cases, speed))
  lines = [limited["why"]] if limited else []
  lines += [f"{passes:.1f} forward passes over {tokens:,} tokens, about {budget.duration(took)} and compiling"]
  if minutes and took > 60 * minutes:
    lines += [
      f"That is more than the limit of {minutes:g} minutes, as at least one batch is evaluated: a smaller batch size, "
      "fewer levels or fewer parts take less."
    ]
  for line in lines:
    console.print(f"analysis  {line}", highlight=False, soft_wrap=True)
  models = []
  with ProgressLine(console, "analysis", 0, total) as bar:
    for case in cases:
      models.append(_analyze_case(case, *(restored or _restore(case, mesh)), mesh, bar))
      restored = None
  found = {"models": models, "comparisons": confidence.comparisons(models), "definitions": DEFINITIONS}
  return found | ({"budget": limited} if limited else {})


def _restore(case: Case, mesh: jax.sharding.Mesh) -> tuple[Any, int]:
  """Its parameters, and the tokens that they have seen."""
  shapes, logical = abstract_parameters(Transformer(case.config))
  return case.stored.restore(checkpoint.abstract(shapes, sharding.shardings(mesh, logical)))


def _analyze_case(case: Case, params: Any, tokens: int, mesh: jax.sharding.Mesh, bar: ProgressLine) -> dict[str, Any]:
  made = analyze(
    case.name,
    Transformer(case.config),
    params,
    case.data,
    mesh,
    source=str(case.stored.path),
    text=case.text,
    trained_tokens=tokens or None,  # none by us: the model is from elsewhere
    levels=case.levels,
    selections=case.selections,
    mask_shared=case.mask_shared,
    parts=case.parts,
    calibration=case.calibration,
    by_source=case.by_source,
    keep=case.keep,
    progress=bar.advance,
  )
  trained = case.stored.step and case.config.activation == case.stored.config.activation  # here, and as it is analysed
  return made | ({"training_loss": final_loss(case.stored.path, case.stored.step)} if trained else {})


def run(
  models: Sequence[str],
  data: str,
  out: Path,
  *,
  levels: Sequence[float],
  tokens: int,
  selections: Sequence[str] = ("hidden",),
  mask_shared: bool = False,
  paper: bool = False,
  parts: Sequence[str] = DEFAULT_PARTS,
  export: str = "",
  batch_size: int | None = None,
  seq_len: int | None = None,
  eos: bool | None = None,
  bos: str = "auto",
  root: str = "",
  text_field: str = "text",
  also: str = "",
  minutes: float = 0.0,
  console: Console | None = None,
) -> dict[str, Any]:
  """Analyses stored models on one text, writes the report to `out` and returns the content of analysis.json.

  Args:
    models: each a workdir of ours or a Hugging Face directory; each is evaluated by its own vocabulary.
    data: a D: all of a file or folder, the validation split of a task or mixture (and of its sources, one by one).
    out: must not exist, or be empty.
    levels: sparsities of the masked-perplexity curves.
    tokens: so many are evaluated, or all of a shorter text; the document that does not fit the rest of them is cut.
    selections: what the curves' masks keep, keys of masks.SELECTIONS.
    mask_shared: mask shared experts too.
    paper: add Tables 1-3 of Turbo Sparse, its numbers beside these.
    parts: of what is beyond zeros and masks, keys of observe.PARTS.
    export: how the counts of every neuron are written, one of neurons.FORMS; "" for not at all.
    batch_size: rows of a forward pass; None for 16, or the devices of the machine if they are more.
    seq_len: tokens of a row; None for the least of the models' own (`Model.row`).
    eos: whether documents end with an end-of-text token, which is scored; None if all models were trained with one.
    bos: whether documents begin with BOS, "on" or "off"; "auto" for what each model was trained with, or its tokenizer
      does.
    root: folder or bucket with the sources of a mixture.
    text_field: of files, that holds the text.
    also: another D, on which loss, zeros and hot neurons are compared with those on `data`; "" for none.
    minutes: that the forward passes may take; less of the text is evaluated where all would take longer. 0: no limit.
    console: where progress and tables are printed.

  Raises:
    UserError: something of the above cannot be; nothing was written.
  """
  console = console or Console()
  check_selections(selections)
  if also == data:
    raise UserError(f"--also={also} is the same as --data: give another text, or leave it out.")
  check_parts(parts)
  neurons.check_form(export)
  files.check_new(out)
  names = unique_names(models)
  stored = [open_model(Path(model)) for model in models]
  if "experts" in parts and not any(model.config.num_experts for model in stored):
    raise UserError("--parts=experts masks one expert after the other, and no --model has experts: leave it out.")
  limit = min(model.config.max_seq_len for model in stored)
  seq_len = seq_len or min(model.row for model in stored)
  if seq_len > limit:
    raise UserError(f"--seq_len={seq_len} is more than the {limit} tokens that the models are made for: lower it.")
  batch_size = sharding.evaluation_rows(batch_size, usual=min(16, -(-tokens // seq_len)))
  mesh = sharding.evaluation_mesh(model.config.d_model for model in stored)
  for model in stored:
    check_fits(model, mesh)
  eos = all(model.eos for model in stored) if eos is None else eos
  with console.status("reading the data"):
    settings = DataSettings(train="", validation=data, eos=eos, bos=bos, root=root, text_field=text_field)
    sizes = {"seq_len": seq_len, "batch_size": batch_size}
    texts = _texts(stored, settings, also, max_tokens=tokens, **sizes)
    others = [
      _calibration(model, settings, text, sizes) if "thresholds" in parts else None
      for model, (text, _) in zip(stored, texts, strict=True)
    ]

  for line in dict.fromkeys(f"text  {_described(data, text)}: {text.size}" for text, _ in texts):
    console.print(line, highlight=False, soft_wrap=True)
  with files.new_folder(out) as folder, jax.set_mesh(mesh):
    began = time.monotonic()
    cases = [
      Case(
        name, model, model.config, text, _described(data, text), levels, selections, mask_shared, parts, other,
        by_source, _exporter(folder / "activation" / (name if len(names) > 1 else ""), export),
      )
      for name, model, (text, by_source), other in zip(names, stored, texts, others, strict=True)
    ]  # fmt: skip
    analysis = analyze_cases(cases, mesh, console, minutes) | {"paper": paper}
    facts = {"data": data, "seq_len": seq_len, "seconds": {"analysis": round(time.monotonic() - began, 1)}}
    page = write_report(analysis, facts | workdir.environment(), folder)
  print_table(analysis, console)
  console.print(f"report  {out / page.name}", highlight=False, soft_wrap=True)
  return analysis


def parse_levels(texts: Sequence[str]) -> tuple[float, ...]:
  """["0", "0.5"] -> (0.0, 0.5); UserError where one is no number in [0, 1)."""
  try:
    levels = tuple(map(float, texts))
  except ValueError:
    levels = (float("nan"),)
  if not all(0 <= level < 1 for level in levels):
    raise UserError(f"--levels={','.join(texts)}: a level is a share of zeros, a number with 0 <= level < 1.")
  return levels


def unique_names(models: Sequence[str]) -> list[str]:
  """The names of the folders, with as many of the folders above as tell them apart; UserError for one given twice."""
  parts = [Path(os.path.abspath(model)).parts for model in models]
  for depth in range(1, max(map(len, parts)) + 1):
    names = ["/".join(path[-depth:]) for path in parts]
    if len(set(names)) == len(names):
      return names
  twice = next(model for model, path in zip(models, parts, strict=True) if parts.count(path) > 1)
  raise UserError(f"--model={twice} is given twice: give each model once.")


def check_fits(model: Model, mesh: jax.sharding.Mesh):
  """Raises UserError where the parameters of a model do not fit the devices of the mesh."""
  needed = 4 * sum(parameter_counts(model.config).values()) / mesh.shape["fsdp"]
  available = memory.device_bytes(jax.devices())
  if needed > available:
    raise UserError(
      f"--model={model.path} does not fit: its parameters take {needed / 1e9:,.1f} GB of each device and there are "
      f"{available / 1e9:,.1f} GB; use a machine with more memory or more devices."
    )


def _described(data: str, text: EvaluationSet) -> str:
  parts = [] if text.eos else ["end-of-text tokens not scored"]
  parts += [] if text.bos else ["without BOS"]
  parts += ([] if text.split == "all" else [text.split]) + ([] if text.complete else ["a part of it"])
  return f"{data} ({', '.join(parts)})" if parts else data


def _calibration(model: Model, data: DataSettings, text: EvaluationSet, sizes: dict[str, int]) -> EvaluationSet | None:
  """Documents after the evaluated ones, of which none may be in part; None where there are no others."""
  own = _own(data, model)
  try:
    return None if text.complete else evaluation_batches(own, max_tokens=CALIBRATION_TOKENS, skip=text.taken, **sizes)
  except NoText:
    return None


def _own(data: DataSettings, model: Model) -> DataSettings:
  """The settings in the vocabulary of the model, with BOS as it has it unless they say otherwise."""
  rows = min(model.config.vocab_size, load_tokenizer(model.vocabulary).size)  # no text needs more than there are tokens
  bos = model.bos if data.bos == "auto" else data.bos
  return dataclasses.replace(data, vocabulary=model.vocabulary, embedded=rows, bos=bos)


def _exporter(folder: Path, form: str) -> Callable[[ModelCounts], None]:
  return lambda counts: neurons.export(counts, folder, form) if form else None


def _texts(
  stored: Sequence[Model], data: DataSettings, also: str, **sizes
) -> list[tuple[EvaluationSet, dict[str, EvaluationSet]]]:
  """The batches of each model, of the whole and of each source and what is `also` read, tokenized once for each
  vocabulary and its BOS."""
  known: list[tuple[Any, tuple[int, int | None], tuple[EvaluationSet, dict[str, EvaluationSet]]]] = []
  result = []
  for model in stored:
    vocabulary = load_tokenizer(model.vocabulary)
    check_embedded(vocabulary, model.config.vocab_size)
    own = _own(data, model)
    how = own.embedded, first_token(vocabulary, own.bos)
    found = next((text for other, its, text in known if its == how and same_tokenizer(other, vocabulary)), None)
    if found is None:
      text = evaluation_batches(own, **sizes)
      if text.complete and text.tokens < sizes["seq_len"]:
        raise UserError(
          f"--data={data.validation} holds {text.tokens} tokens, less than a row of {sizes['seq_len']}: give more, or "
          f"--seq_len={text.tokens} at most."
        )
      sources = evaluation_by_source(own, **sizes)
      if also:
        second = evaluation_batches(dataclasses.replace(own, validation=also), **sizes)
        sources = (sources or {data.validation: text}) | {also: second}
      found = text, sources
      known.append((vocabulary, how, found))
    result.append(found)
  return result
