"""One experiment from its config: check, train or ReLUfy, analyse, report. `experiments/run.py` calls `run`."""

import contextlib
import copy
import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console

from tsparse import files, hosts, sharding
from tsparse import workdir as workdirs
from tsparse.activations import activation
from tsparse.analysis import gap
from tsparse.analysis.report import print_table, write_report
from tsparse.analysis.run import Case, analyze_cases
from tsparse.calibrated import calibrated
from tsparse.check import check, check_sections
from tsparse.convert.model import Model, open_model
from tsparse.data import (
  EvaluationSet,
  Leakage,
  accounts_at,
  check_disjoint,
  data_settings,
  describe,
  evaluation_batches,
  evaluation_by_source,
  first_token,
  load_tokenizer,
)
from tsparse.data.tokenizer_files import KEPT, vocabulary_of
from tsparse.errors import UserError
from tsparse.models.config import ffn_layers, model_config
from tsparse.progress import warn
from tsparse.recipes.recipe import recipe_of
from tsparse.recipes.thresholds import restored_with
from tsparse.stages import Stage, describe_phase, main_name, phases_of, stages_of
from tsparse.train import checkpoint, resume
from tsparse.train.log import trace
from tsparse.train.loop import Source, train


def run(config: ml_collections.ConfigDict, workdir: Path, console: Console | None = None) -> dict[str, Any]:
  """Does what `config` says in `workdir`, resuming whatever is there; returns the content of analysis.json.

  With `config.init` the model starts from that workdir's parameters. With `config.base` and no init, a base is trained
  first, in WORKDIR/base. Either way the activation is swapped to `config.activation`. Then come the phases of
  `config.phases` (tsparse/stages.py), in WORKDIR/phases.

  Raises:
    UserError: the config cannot be run here; nothing was changed.
    RunFailure: training went wrong.
    Stopped: a signal stopped training, which saved itself.
  """
  console = (console or Console()) if hosts.is_main() else Console(quiet=True)
  check_sections(config)
  vocabulary = vocabulary_of(workdir, config.data.vocabulary)
  with console.status("reading the data"):
    for stage in stages_of(config, workdir):
      try:
        check(stage.reading(vocabulary).config)
      except UserError as error:
        raise UserError(f"{stage.place}{error}") from None
    recorded = stages_of(with_bos(config, workdir), workdir)
    for stage in recorded:
      workdirs.check_free(stage.folder, stage.config)
    stages = [stage.reading(vocabulary) for stage in recorded]
    config = next(stage.config for stage in stages if stage.name == "main")
    texts = held_out_texts(stages, config)
    leaks = leaks_of(stages)
    lines = [describe(data_settings(config.data)), held_out_line(config.data, texts["main"])]
    for phase in phases_of(stages):
      lines += [describe_phase(phase, config), describe(data_settings(phase.config.data))]
      lines += [held_out_line(phase.config.data, texts[phase.name])]
    lines += [f"{name}: {leak.sentence}" for name, leak in leaks.items()]
  for line in dict.fromkeys(filter(None, lines)):
    console.print(f"data  {line}", highlight=False, soft_wrap=True)

  seconds = {}
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as claims:
    like = workdir if (workdir / KEPT).is_dir() else recorded[0].folder
    for stage in recorded:
      claim = workdirs.claim(stage.folder, stage.config, None if like == stage.folder else like)
      hosts.on_main(functools.partial(claims.enter_context, claim))
    for stage in stages:
      began = time.monotonic()
      held_out, by_source = texts[stage.name]
      quick = held_out.batches[: stage.config.train.eval_batches]
      quick_by_source = {name: each.batches[:1] for name, each in by_source.items()}
      init = stage.init and source_of(stage, console)
      teacher = stage.init and teacher_of(stage, init)
      train(stage.config, stage.folder, mesh, quick, console, stage.title, init, quick_by_source, teacher)
      seconds[stage.title] = round(time.monotonic() - began, 1)
      if stage.config.sparsity.calibrate and stage.name == "main":
        calibrated(stage, mesh, console)
    began = time.monotonic()
    analysis = analyze_stages(stages, texts, mesh, console)
    analysis |= {"leakage": {name: found.facts() for name, found in leaks.items()}}
    seconds["analysis"] = round(time.monotonic() - began, 1)

    facts = {"config": config.name, "workdir": str(workdir), "seconds": seconds, **workdirs.environment()}
    hosts.on_main(lambda: write_report(analysis, facts, workdir / "report"))
  print_table(analysis, console)
  console.print(f"report  {workdir / 'report' / 'report.html'}", highlight=False, soft_wrap=True)
  return analysis


def with_bos(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
  """The config with "on" or "off" for a `data.bos` that is "auto": what the workdir already records, else as the model
  that it starts from, else as the tokenizer does."""
  bos = data_settings(config.data).bos
  if bos == "auto" and (workdir / "config.json").exists():
    bos = workdirs.read_config(workdir).get("data", {}).get("bos", "on")  # on: before there was a choice
  else:
    if bos == "auto" and config.init:
      bos = open_model(Path(config.init)).bos
    if bos == "auto":
      bos = "off" if first_token(load_tokenizer(config.data.vocabulary), bos) is None else "on"
  config = copy.deepcopy(config)
  with config.unlocked():
    config.data.bos = bos
  return config


def source_of(stage: Stage, console: Console) -> Source:
  """What the stage starts from."""
  stored, model = open_model(stage.init).config, model_config(stage.config)
  restore = functools.partial(restore_init, stage.init, stage.folder, console)
  if model.hidden_thresholds:
    restore = restored_with(restore, stored, ffn_layers(model), stage.config.sparsity.threshold)
  return Source(restore, stored)


def teacher_of(stage: Stage, init: Source) -> Source | None:
  """Whom the stage's recipe learns from, if anyone: the model that it starts from, unless the config names one."""
  if not recipe_of(stage.config).teacher:
    return None
  if path := stage.config.train.distill_teacher:
    teacher = open_model(Path(path))
    return Source(teacher.restore, teacher.config)
  return init


def restore_init(init: Path, workdir: Path, console: Console, target: Any) -> tuple[Any, int]:
  """The parameters that the experiment of `workdir` starts from, and the tokens they have seen.

  They are those of the newest whole checkpoint of `init` at its first start, which WORKDIR/init.json then names.
  """
  if not hosts.any_host(not (workdir / "init.json").exists()):
    return open_init(init, workdir).restore(target)
  steps = resume.finished(init)
  if steps:
    restored, torn = resume.newest_whole(steps, lambda step: (step, open_model(init, step).restore(target)))
    if restored is None:
      each = "; ".join(f"step {step}: {reason}" for step, reason in torn.items())
      raise UserError(f"no checkpoint of config.init {init} can be restored ({each}): give another, or mend one.")
    step, found = restored
    for newer, reason in torn.items():
      warn(console, f"the checkpoint of step {newer} of {init} is torn ({reason}); starting from step {step} instead.")
  else:  # a Hugging Face directory
    step, found = 0, open_model(init).restore(target)
  hosts.on_main(lambda: files.write(workdir / "init.json", files.to_json({"model": init, "step": step})))
  return found


def open_init(init: Path, workdir: Path) -> Model:
  """The model that the experiment of `workdir` started from."""
  return open_model(init, json.loads((workdir / "init.json").read_text())["step"])


def held_out_texts(
  stages: Sequence[Stage], config: ml_collections.ConfigDict
) -> dict[str, tuple[EvaluationSet, dict[str, EvaluationSet]]]:
  """name of each stage -> the held-out text of its data, and that of each source of a mixture.

  All are in rows of `config.train.seq_len`, so that losses of phases with other contexts compare.
  """
  sizes = {
    "seq_len": config.train.seq_len,
    "batch_size": config.analysis.batch_size,
    "max_tokens": config.analysis.tokens,
  }
  found = {}
  for stage in stages:
    data = stage.config.data
    if data.to_json() not in found:
      read = data_settings(data, embedded=config.model.vocab_size)
      found[data.to_json()] = evaluation_batches(read, **sizes), evaluation_by_source(read, **sizes)
  return {stage.name: found[stage.config.data.to_json()] for stage in stages}


def leaks_of(stages: Sequence[Stage]) -> dict[str, Leakage]:
  """What of the held-out text is trained on: by the main stage, and by each phase that has other data, of its own text
  and of the main one's, on which its model is evaluated too.

  Raises:
    UserError: it is more than `config.data.allow_overlap`.
  """
  main = next(stage for stage in stages if stage.name == "main")
  text, found = data_settings(main.config.data), {"main": check_disjoint(data_settings(main.config.data))}
  for phase in phases_of(stages):
    data = data_settings(phase.config.data)
    if data != text:
      found |= {phase.name: check_disjoint(data), f"main, in {phase.name}": check_disjoint(text, data)}
  return {name: leak for name, leak in found.items() if leak}


def held_out_line(data: ml_collections.ConfigDict, texts: tuple[EvaluationSet, dict[str, EvaluationSet]]) -> str:
  """What is evaluated on, as the console says it, with the sources of a mixture that are short."""
  held_out, by_source = texts
  notes = "".join(f"; {name}: {each.size}" for name, each in by_source.items() if each.complete and each.note)
  return f"held out of {text_name(data)}: {held_out.size}{notes}"


def analyze_stages(
  stages: Sequence[Stage],
  texts: Mapping[str, tuple[EvaluationSet, dict[str, EvaluationSet]]],
  mesh: jax.sharding.Mesh,
  console: Console,
) -> dict[str, Any]:
  """analysis.json of an experiment: the base, the base with its activation swapped, the model as trained, each phase.

  All are evaluated on the held-out text of the main stage and, source by source, on those of all stages.
  """
  main, phases = next(stage for stage in stages if stage.name == "main"), phases_of(stages)
  config, model = main.config, model_config(main.config)
  if main.init is None:
    cases = [(main_name(config), open_model(main.folder), model.activation, config.analysis.levels)]
  else:
    start = open_init(main.init, main.folder)
    before = start.config.activation
    cases = [("base", start, before, config.analysis.levels)]
    if control := control_folder(main):
      kept = open_model(control)
      cases.append((gap.CONTROL, kept, kept.config.activation, config.analysis.levels))
    if before != model.activation:
      cases.append(("swapped", start, model.activation, ()))
    cases.append((main_name(config), open_model(main.folder), model.activation, config.analysis.levels))
  if config.sparsity.calibrate:
    kept = open_model(main.folder / "calibrated")
    cases.append(("calibrated", kept, model.activation, config.analysis.levels))
  cases += [(phase.name, open_model(phase.folder), model.activation, config.analysis.levels) for phase in phases]

  held_out, by_source = texts["main"]
  for phase in phases:
    whole, parts = texts[phase.name]
    if whole is not held_out:
      by_source = (parts or {text_name(phase.config.data): whole}) | by_source
  text = f"{text_name(config.data)} (held out{'' if held_out.bos else ', without BOS'})"
  analysis = analyze_cases(
    [
      Case(
        name,
        stored,
        dataclasses.replace(model, activation=activation(act).name, hidden_thresholds=stored.config.hidden_thresholds),
        held_out,
        text,
        levels,
        parts=("counts", "thresholds") if name == gap.CONTROL and config.analysis.thresholds else ("counts",),
        by_source=by_source,
      )
      for name, stored, act, levels in cases
    ],
    mesh,
    console,
    config.analysis.minutes,
    main.folder / "analysis_size.json",
  )
  if recipe_of(config).on:
    trained = next(m for m in analysis["models"] if m["name"] == main_name(config))
    trained["training"] = trace(main.folder)
  drawn = {phase.name: accounts_at(checkpoint.data_position(phase.folder)) for phase in phases}
  return analysis | {"sources": accounts_at(checkpoint.data_position(main.folder)), "phases": drawn}


def control_folder(main: Stage) -> Path | None:
  """Where the control of an experiment is, if it has one."""
  if "control" not in main.config:
    return None
  elsewhere = main.config.control.get("workdir", "")
  return Path(elsewhere) if elsewhere else main.folder / "control"


def text_name(data: ml_collections.ConfigDict) -> str:
  """What the held-out text of `config.data` is called."""
  return data.validation or data.mixture or data.train
