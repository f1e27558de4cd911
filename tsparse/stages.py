"""What an experiment trains, one stage after the other: its base and its control, if it has them; itself; its phases.

`config.control` is what the experiment is compared with: the same start, tokens, batches and schedule, with the start's
activation kept and no recipe. Other values of `train` may be stated in it (the best learning rate is another), and
`workdir`, of a control that another run has trained, is read in its place.

`config.phases.order` names the phases in their order (a ConfigDict keeps none), and `config.phases.NAME` states the
fields of `data` and `train` in which one differs from the config, and how long it is: `train.steps`, or `tokens`, which
are turned into steps and rounded up:

  config.phases = ConfigDict({"order": "sft", "sft": {
    "tokens": 10_000_000, "data": {"train": "chat:sft/train.jsonl"}, "train": {"learning_rate": 1e-5}}})

A phase starts from the parameters that the stage before ended with, and from a fresh optimizer: the moments of that
stage are of other data at another learning rate. Its schedule (warm-up, cosine) is its own. Its folder is a workdir of
its own, WORKDIR/phases/NAME, whose init.json says which checkpoint it started from (its config names no init).
"""

import copy
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from tsparse.convert.model import open_model
from tsparse.errors import UserError
from tsparse.recipes import recipe

RESERVED = ("base", "control", "main")


@dataclasses.dataclass(frozen=True)
class Stage:
  """A training that is part of an experiment.

  Attributes:
    name: "base", "control", "main" or that of a phase.
    config: a whole experiment of its own.
    folder: its workdir.
    init: the model it starts from; None for random parameters.
    title: what progress calls it.
    place: where it is stated: put before what is wrong with it.
  """

  name: str
  config: ml_collections.ConfigDict
  folder: Path
  init: Path | None
  title: str
  place: str = ""

  def reading(self, vocabulary: str) -> "Stage":
    """The stage with another path of its tokenizer."""
    if vocabulary == self.config.data.vocabulary:
      return self
    config = copy.deepcopy(self.config)
    config.data.vocabulary = vocabulary
    return dataclasses.replace(self, config=config)


def stages_of(config: ml_collections.ConfigDict, workdir: Path) -> list[Stage]:
  """The stages of an experiment in their order; UserError where its phases make no sense."""
  init = Path(config.init) if config.init else None
  base = base_config(config)
  found = []
  if base:
    init = workdir / "base"
    found.append(Stage("base", base, init, None, f"base ({base.activation})", "config.base: "))
  if "control" in config and not config.control.get("workdir", ""):
    found.append(control_of(config, workdir, init))
  found.append(Stage("main", config, workdir, init, f"{main_name(config)} ({config.activation})"))
  for name in phase_names(config):
    folder, place = workdir / "phases" / name, f"config.phases.{name}"
    phase = phase_config(config, name)
    found.append(Stage(name, phase, folder, found[-1].folder, f"phase {name} ({phase.activation})", f"{place}: "))
  return found


def main_name(config: ml_collections.ConfigDict) -> str:
  """What progress, tables and JSON call the model of the main stage."""
  start = Path(config.init)
  if config.init:
    before = open_model(start).config.activation if (start / "config.json").exists() else ""  # `check` asks for it
  else:
    before = config.base.activation if "base" in config else config.activation
  return "trained" if before in ("", config.activation) else "recovered"


def phases_of(stages: Sequence[Stage]) -> list[Stage]:
  """Those that follow the main one."""
  return [stage for stage in stages if stage.name not in RESERVED]


def control_of(config: ml_collections.ConfigDict, workdir: Path, init: Path | None) -> Stage:
  """The control of an experiment, in WORKDIR/control; UserError where it makes no sense."""
  if init is None:
    raise UserError("config.control: there is no config.init and no config.base that the control could start from.")
  control = recipe.plain(_alone(config, "control"))
  start = open_model(Path(config.init)).config if config.init else None
  control.activation = start.activation if start else config.base.activation
  control.model.hidden_thresholds = start.hidden_thresholds if start else False
  for key, value in config.control.get("train", {}).items():
    _set(control.train, key, value, "config.control.train")
  return Stage("control", control, workdir / "control", init, f"control ({control.activation})", "config.control: ")


def base_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
  """The experiment that trains the base of a ReLUfication, or None when there is an init or no base to train."""
  if "base" not in config or config.init:
    return None
  base = recipe.plain(_alone(config, "base"))
  base.activation = config.base.activation
  base.model.hidden_thresholds = False
  base.train.update(config.base.train)
  return base


def phase_names(config: ml_collections.ConfigDict) -> list[str]:
  """The phases that are run, in their order; UserError where one is not stated, or named twice."""
  phases = config.get("phases", {})
  if not isinstance(phases.get("order", ""), str):
    raise UserError(f"config.phases.order is {phases.order!r}: write the names in one text, 'one,two'.")
  names = [name.strip() for name in phases.get("order", "").split(",") if name.strip()]
  for name in names:
    known = ", ".join(sorted(key for key in phases if key != "order")) or "none"
    if name == "order" or not isinstance(phases.get(name), ml_collections.ConfigDict):
      raise UserError(f"config.phases.order names {name!r}, which config.phases does not state (it states {known}).")
    if not name.isidentifier() or name in RESERVED:
      raise UserError(f"config.phases.{name}: the name of a phase is letters, digits and _, not {', '.join(RESERVED)}.")
    if names.count(name) > 1:
      raise UserError(f"config.phases.order names {name!r} twice: give a phase that is to come again another name.")
  return names


def phase_config(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
  """A phase as an experiment of its own: `config` with the fields that the phase states; UserError for a bad one."""
  stated, place = config.phases[name], f"config.phases.{name}"
  phase = recipe.without_start(_alone(config, name))
  phase.init = ""
  for section, fields in stated.items():
    if section == "tokens":
      continue
    if section not in ("data", "train") or not isinstance(fields, ml_collections.ConfigDict):
      raise UserError(f"{place}.{section}: a phase states data, train and tokens, and nothing else.")
    for key, value in fields.items():
      _set(phase[section], key, value, f"{place}.{section}")
  data = stated.get("data", {})
  if "vocabulary" in data:
    raise UserError(f"{place}.data.vocabulary: all phases of a model have the vocabulary config.data.vocabulary.")
  if "train" in data and phase.data.mixture and "mixture" not in data:
    raise UserError(
      f"{place}.data.train: config.data.mixture would be drawn from in its place; set {place}.data.mixture, to '' for "
      "no mixture."
    )
  if "tokens" in stated:
    if "steps" in stated.get("train", {}):
      raise UserError(f"{place} states both tokens and train.steps: leave out one.")
    phase.train.steps = _steps(stated.tokens, phase.train, place)
  return phase


def describe_phase(stage: Stage, config: ml_collections.ConfigDict) -> str:
  """One line: how long the phase is, and what of its tokens was asked for."""
  train, asked = stage.config.train, config.phases[stage.name].get("tokens")
  tokens = train.steps * train.batch_size * train.seq_len
  rounded = f", {asked:,} rounded up" if asked not in (None, tokens) else ""
  return (
    f"phase {stage.name}: {train.steps:,} steps of {train.batch_size} x {train.seq_len} tokens, {tokens:,}{rounded}"
  )


def _alone(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
  """A copy of the experiment without its other stages."""
  alone = copy.deepcopy(config)
  alone.name = f"{config.name} {name}"
  with alone.unlocked():
    for other in ("base", "control", "phases"):
      if other in alone:
        del alone[other]
  return alone


def _set(section: ml_collections.ConfigDict, key: str, value: Any, place: str):
  if key not in section:
    nearest = difflib.get_close_matches(key, list(section), n=1, cutoff=0.0)[0]
    raise UserError(f"{place}.{key}: there is no such field; the nearest is {place}.{nearest}.")
  try:
    section[key] = value
  except TypeError:
    raise UserError(
      f"{place}.{key} is {value!r}, a {type(value).__name__}, and {type(section[key]).__name__} belongs there."
    ) from None


def _steps(tokens: Any, train: ml_collections.ConfigDict, place: str) -> int:
  each = train.batch_size * train.seq_len
  if not isinstance(tokens, int) or tokens < each:
    raise UserError(
      f"{place}.tokens is {tokens}, which is no whole step of {train.batch_size} x {train.seq_len} tokens: set it to "
      f"{each} or more."
    )
  return -(-tokens // each)
