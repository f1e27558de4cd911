"""One experiment from its config: check, train or ReLUfy, analyse, report. `experiments/run.py` calls `run`."""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console

from tsparse import sharding
from tsparse import workdir as workdirs
from tsparse.activations import activation
from tsparse.analysis.analyze import DEFINITIONS, analyze
from tsparse.analysis.report import print_table, write_report
from tsparse.data import EvaluationSet, check_data, evaluation_batches
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, model_config
from tsparse.models.transformer import Transformer, remat_policy
from tsparse.train import checkpoint, memory
from tsparse.train.loop import prepare, train

# Fields of a model that may differ between a checkpoint and the experiment that starts from it.
FREE_FIELDS = ("activation", "dtype", "remat", "max_seq_len")


def run(config: ml_collections.ConfigDict, workdir: Path, console: Console | None = None) -> dict[str, Any]:
  """Does what `config` says in `workdir`, resuming whatever is there; returns the content of analysis.json.

  With `config.init` the model starts from that workdir's parameters. With `config.base` and no init, a base is trained
  first, in WORKDIR/base. Either way the activation is swapped to `config.activation`.

  Raises:
    UserError: the config cannot be run here; nothing was changed.
    RunFailure: training went wrong.
  """
  console = console or Console()
  mesh = sharding.make_mesh(config.mesh)
  base = base_config(config)
  stages = [base, config] if base else [config]
  for stage in stages:
    check(stage, mesh)
  workdirs.claim(workdir, config)
  if base:
    workdirs.claim(workdir / "base", base)
  init = workdir / "base" if base else Path(config.init) if config.init else None

  seconds = {}
  with jax.set_mesh(mesh):
    held_out = evaluation_batches(
      config.data,
      seq_len=config.train.seq_len,
      batch_size=config.analysis.batch_size,
      max_tokens=config.analysis.tokens,
    )
    for stage, folder, start, title in [
      *([(base, workdir / "base", None, f"base ({base.activation})")] if base else []),
      (config, workdir, init, f"{'recovery' if init else 'training'} ({config.activation})"),
    ]:
      began = time.monotonic()
      train(stage, folder, mesh, quick(held_out, stage.train.eval_batches), console, title, start)
      seconds[title] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    analysis = analyze_stages(config, workdir, init, mesh, held_out, console)
    seconds["analysis"] = round(time.monotonic() - began, 1)

  facts = {"config": config.name, "workdir": str(workdir), "seconds": seconds, **workdirs.environment()}
  page = write_report(analysis, facts, workdir / "report")
  print_table(analysis, console)
  console.print(f"report  {page}", highlight=False, soft_wrap=True)
  return analysis


def quick(data: EvaluationSet, batches: int) -> EvaluationSet:
  """The first few batches, for the loss on held-out text during training."""
  return dataclasses.replace(data, batches=data.batches[:batches])


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


def check(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
  """Raises UserError for everything about `config` that can be known to be wrong before memory is allocated."""
  settings = config.train
  for key in ("steps", "batch_size", "seq_len", "microbatches", "keep_checkpoints", "checkpoint_every", "log_every",
              "eval_every", "eval_batches", "learning_rate", "clip_norm"):  # fmt: skip
    if not settings[key] > 0:
      raise UserError(f"config.train.{key} is {settings[key]}; it must be positive.")
  if not 0 <= settings.warmup_steps < settings.steps:
    raise UserError(
      f"config.train.warmup_steps is {settings.warmup_steps}; it must be at least 0 and below steps, {settings.steps}."
    )
  if any(not 0 <= level < 1 for level in config.analysis.levels):
    raise UserError(f"config.analysis.levels is {config.analysis.levels}: a level is a share of zeros, 0 <= level < 1.")
  if config.analysis.tokens <= 0 or config.analysis.batch_size <= 0:
    raise UserError("config.analysis.tokens and config.analysis.batch_size must be positive.")
  model = model_config(config)
  remat_policy(model.remat)
  if settings.seq_len > model.max_seq_len:
    raise UserError(
      f"config.train.seq_len is {settings.seq_len} and the model is made for at most {model.max_seq_len} tokens: lower "
      "it, or raise --config.model.max_seq_len if you mean to train longer positions."
    )
  rows, left = divmod(settings.batch_size, settings.microbatches)
  if left:
    raise UserError(
      f"config.train.batch_size is {settings.batch_size}; it must be a multiple of config.train.microbatches, "
      f"{settings.microbatches}."
    )
  sharding.check_divisible(mesh, {"B": rows, **model.sizes})
  sharding.check_divisible(mesh, {"B": config.analysis.batch_size})

  rows_per_device = rows // sharding.shard_count(mesh, "B")
  needed = memory.training_bytes(
    model, prepare(config, mesh).target, rows_per_device, settings.seq_len, settings.microbatches
  )
  memory.check_fits(needed, memory.device_bytes(jax.devices()), config.name, config.smaller)
  if config.init:
    check_init(Path(config.init), config, model)
  check_data(config.data, model.vocab_size)


def check_init(init: Path, config: ml_collections.ConfigDict, model: ModelConfig):
  """Raises UserError when the checkpoint `init` is no start for `config`: other architecture or vocabulary."""
  held = workdirs.read_config(init)
  source = ModelConfig(**held["model"], activation=held["activation"])
  changed = [
    f"{field.name} is {getattr(source, field.name)} there and {getattr(model, field.name)} here"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in FREE_FIELDS and getattr(source, field.name) != getattr(model, field.name)
  ]
  if changed:
    raise UserError(
      f"config.init {init} holds another architecture: {', '.join(changed)}. Set config.model to the checkpoint's."
    )
  theirs, ours = held["data"]["vocabulary"], config.data.vocabulary
  if theirs != ours:
    raise UserError(
      f"config.init {init} was trained with the vocabulary {theirs!r} and config.data.vocabulary is {ours!r}: token "
      "ids would mean other things; use the checkpoint's."
    )


def analyze_stages(
  config: ml_collections.ConfigDict,
  workdir: Path,
  init: Path | None,
  mesh: jax.sharding.Mesh,
  held_out: EvaluationSet,
  console: Console,
) -> dict[str, Any]:
  """analysis.json of an experiment: the base, the base with its activation swapped, and the model as trained."""
  target = prepare(config, mesh).target.params
  model = model_config(config)
  if init is None:
    cases = [("trained", workdir, model.activation, config.analysis.levels)]
  else:
    before = workdirs.read_config(init)["activation"]
    cases = [("base", init, before, config.analysis.levels)]
    if before != model.activation:
      cases.append(("swapped", init, model.activation, ()))
    cases.append(
      ("recovered" if before != model.activation else "trained", workdir, model.activation, config.analysis.levels)
    )

  models = []
  with console.status("analysis") as status:
    for name, folder, act, levels in cases:
      params, tokens = checkpoint.restore_parameters(folder, target)
      entry = analyze(
        name,
        Transformer(dataclasses.replace(model, activation=activation(act).name)),
        params,
        held_out,
        mesh,
        source=str(folder),
        text=f"{config.data.validation or config.data.train} (held out)",
        trained_tokens=tokens,
        levels=levels,
        progress=status.update,
      )
      models.append(entry)
  return {"models": models, "definitions": DEFINITIONS}
