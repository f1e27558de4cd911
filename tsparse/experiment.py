"""One experiment from its config: check, train or ReLUfy, analyse, report. `experiments/run.py` calls `run`."""

import contextlib
import copy
import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console

from tsparse import files, hosts, sharding
from tsparse import workdir as workdirs
from tsparse.activations import activation
from tsparse.analysis.report import print_table, write_report
from tsparse.analysis.run import Case, analyze_cases
from tsparse.check import check, check_sections
from tsparse.convert.model import Model, open_model
from tsparse.data import EvaluationSet, accounts_at, data_settings, describe, evaluation_batches, evaluation_by_source
from tsparse.errors import UserError
from tsparse.models.config import model_config
from tsparse.progress import warn
from tsparse.train import checkpoint, resume
from tsparse.train.loop import train


def run(config: ml_collections.ConfigDict, workdir: Path, console: Console | None = None) -> dict[str, Any]:
  """Does what `config` says in `workdir`, resuming whatever is there; returns the content of analysis.json.

  With `config.init` the model starts from that workdir's parameters. With `config.base` and no init, a base is trained
  first, in WORKDIR/base. Either way the activation is swapped to `config.activation`.

  Raises:
    UserError: the config cannot be run here; nothing was changed.
    RunFailure: training went wrong.
    Stopped: a signal stopped training, which saved itself.
  """
  console = (console or Console()) if hosts.is_main() else Console(quiet=True)
  check_sections(config)
  base = base_config(config)
  init = workdir / "base" if base else Path(config.init) if config.init else None
  stages = [(config, workdir, init, f"{'continued' if init else 'training'} ({config.activation})")]
  if base:
    stages.insert(0, (base, workdir / "base", None, f"base ({base.activation})"))
  with console.status("reading the data"):
    for stage, folder, *_ in stages:
      try:
        check(stage)
      except UserError as error:
        raise UserError(f"config.base: {error}" if stage is base else str(error)) from None
      workdirs.check_free(folder, stage)
    mixture = describe(data_settings(config.data))
  if mixture:
    console.print(f"data  {mixture}", highlight=False, soft_wrap=True)

  seconds = {}
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as claims:
    for stage, folder, *_ in stages:
      hosts.on_main(functools.partial(claims.enter_context, workdirs.claim(folder, stage)))
    sizes = {
      "seq_len": config.train.seq_len,
      "batch_size": config.analysis.batch_size,
      "max_tokens": config.analysis.tokens,
    }
    held_out, by_source = evaluation_batches(config.data, **sizes), evaluation_by_source(config.data, **sizes)
    for stage, folder, start, title in stages:
      began = time.monotonic()
      quick = held_out.batches[: stage.train.eval_batches]
      quick_by_source = {name: each.batches[:1] for name, each in by_source.items()}
      restore = functools.partial(restore_init, start, folder, console) if start else None
      train(stage, folder, mesh, quick, console, title, restore, quick_by_source)
      seconds[title] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    analysis = analyze_stages(config, workdir, init, mesh, held_out, by_source, console)
    seconds["analysis"] = round(time.monotonic() - began, 1)

    facts = {"config": config.name, "workdir": str(workdir), "seconds": seconds, **workdirs.environment()}
    hosts.on_main(lambda: write_report(analysis, facts, workdir / "report"))
  print_table(analysis, console)
  console.print(f"report  {workdir / 'report' / 'report.html'}", highlight=False, soft_wrap=True)
  return analysis


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


def base_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
  """The experiment that trains the base of a ReLUfication, or None when there is an init or no base to train."""
  if "base" not in config or config.init:
    return None
  base = copy.deepcopy(config)
  base.name = f"{config.name} base"
  base.activation = config.base.activation
  base.train.update(config.base.train)
  with base.unlocked():
    del base.base
  return base


def analyze_stages(
  config: ml_collections.ConfigDict,
  workdir: Path,
  init: Path | None,
  mesh: jax.sharding.Mesh,
  held_out: EvaluationSet,
  by_source: Mapping[str, EvaluationSet],
  console: Console,
) -> dict[str, Any]:
  """analysis.json of an experiment: the base, the base with its activation swapped, and the model as trained."""
  model = model_config(config)
  if init is None:
    cases = [("trained", open_model(workdir), model.activation, config.analysis.levels)]
  else:
    start = open_init(init, workdir)
    before = start.config.activation
    cases = [("base", start, before, config.analysis.levels)]
    if before != model.activation:
      cases.append(("swapped", start, model.activation, ()))
    name = "recovered" if before != model.activation else "trained"
    cases.append((name, open_model(workdir), model.activation, config.analysis.levels))

  text = f"{config.data.validation or config.data.mixture or config.data.train} (held out)"
  analysis = analyze_cases(
    [
      Case(name, stored, dataclasses.replace(model, activation=activation(act).name), held_out, text, levels, by_source)
      for name, stored, act, levels in cases
    ],
    mesh,
    console,
  )
  return analysis | {"sources": accounts_at(checkpoint.data_position(workdir))}
