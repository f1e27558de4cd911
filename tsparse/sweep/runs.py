"""The runs of a sweep: which values of which fields, under which names, as which commands."""

import dataclasses
import difflib
import hashlib
import itertools
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from tsparse import workdir as workdirs
from tsparse.errors import UserError

BRACKETS = {"(": ")", "[": "]", "{": "}"}
LONGEST = 120  # characters of a name, which is a folder's
VARIANT = "config"  # the field of a sweep whose values are NAMEs of --config=FILE:NAME, the variants that FILE knows


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: what differs, "activation=relu,learning_rate=0.001"; also that of its folder in the sweep's.
    values: each swept field, "config.train.learning_rate" -> its value, of the field's own type; VARIANT -> its text.
    arguments: of experiments/run.py, the workdir among them.
    config: the resolved experiment.
    workdir: where it is written.
  """

  name: str
  values: dict[str, Any]
  arguments: tuple[str, ...]
  config: ml_collections.ConfigDict
  workdir: Path

  @property
  def title(self) -> str:
    """What pictures call it: text speaks for itself, "relu, learning_rate=0.001"."""
    return title_of(self.values, list(self.values))

  @property
  def state(self) -> str:
    """done (it has its report), begun or new."""
    if (self.workdir / "report" / "analysis.json").exists():
      return "done"
    return "begun" if (self.workdir / "config.json").exists() else "new"


def stated(experiment: str) -> Sequence[str]:
  """The SWEEP of a config file, in the form of --sweep; UserError where it states none."""
  found = runpy.run_path(experiment.partition(":")[0]).get("SWEEP", ())
  if not found:
    raise UserError(
      'there is nothing to sweep: give --sweep="config.FIELD=VALUE,VALUE", or a config that states SWEEP, as those of '
      "configs/ablations do."
    )
  return [found] if isinstance(found, str) else found


def overrides(values: Mapping[str, Any]) -> list[str]:
  """The flags that set `values` (field without its `config.` -> value) in another command."""
  return [
    f"--config.{field}={str(value).lower() if isinstance(value, bool) else value}" for field, value in values.items()
  ]


def expand(experiment: str, common: Sequence[str], sweeps: Sequence[str], zipped: bool, folder: Path) -> list[Run]:
  """The runs of a sweep in their order, the last field fastest.

  Args:
    experiment: the value of --config.
    common: flags --config.FIELD=VALUE of all runs.
    sweeps: FIELD=VALUE,VALUE each.
    zipped: pair values instead of making a grid.
    folder: of the sweep.

  Raises:
    UserError: a field that is not in the config, a value that is not of its type, two runs with one workdir, or a
      workdir that holds another experiment.
  """
  base = load((f"--config={experiment}", *common))
  axes = parse(sweeps, base)
  file, _, variant = experiment.partition(":")
  for field in axes:
    if any(flag.startswith(f"--{field}=") for flag in common) or (field == VARIANT and variant):
      raise UserError(f"--{field} is swept and set for all runs: leave one of them out.")
  lengths = {field: len(texts) for field, texts in axes.items()}
  if zipped and len(set(lengths.values())) > 1:
    each = ", ".join(f"{field} has {length}" for field, length in lengths.items())
    raise UserError(f"--zip pairs values, and there are not as many of each: {each}.")
  combinations = zip(*axes.values(), strict=True) if zipped else itertools.product(*axes.values())

  runs, taken = [], {}
  for texts in combinations:
    chosen = dict(zip(axes, texts, strict=True))
    swept = {field: f"--{field}={text}" for field, text in chosen.items()}
    start = f"--config={file}:{chosen[VARIANT]}" if VARIANT in chosen else f"--config={experiment}"
    arguments = (start, *common, *(flag for field, flag in swept.items() if field != VARIANT))
    config = load(arguments)
    values = {field: text if field == VARIANT else _get(config, field) for field, text in chosen.items()}
    name = name_of(values)
    if name in taken:
      raise UserError(
        f"the runs {taken[name]} and {' '.join(swept.values())} would share the workdir {folder / name}: leave one "
        "out, or give their values names that differ in letters, digits or any of ._+-."
      )
    taken[name] = " ".join(swept.values())
    place = folder / name
    workdirs.check_free(place, config)
    runs.append(Run(name, values, (*arguments, f"--workdir={place}"), config, place))
  return runs


def parse(sweeps: Sequence[str], config: ml_collections.ConfigDict) -> dict[str, list[str]]:
  """Field ("config.train.steps") -> its values as text; UserError for no field of `config`, or no values."""
  fields = workdirs.flatten(config.to_dict())
  found = {}
  for sweep in sweeps:
    field, equals, values = (part.strip() for part in sweep.lstrip("-").partition("="))
    if field not in (*fields, VARIANT):
      nearest = difflib.get_close_matches(field, fields, n=1, cutoff=0.0)[0]
      raise UserError(
        f"--sweep={sweep}: the config has no field {field!r}; the nearest is {nearest} (now {fields[nearest]!r})."
      )
    if field in found:
      raise UserError(f"--sweep={sweep}: {field} is swept twice; write all of its values in one --sweep.")
    if not equals or not values:
      raise UserError(f"--sweep={sweep}: there are no values; write {field}=VALUE,VALUE.")
    try:
      found[field] = split(values)
    except ValueError as error:
      raise UserError(f"--sweep={sweep}: {error}.") from None
  return found


def split(text: str) -> list[str]:
  """The values of "a,(b,c),'d,e'": a, (b,c) and d,e. ValueError, a sentence, for one that is empty or not closed."""
  values, start, closers, quote = [], 0, [], ""
  for i, letter in enumerate(text + ","):
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "'\"" and (closers or not text[start:i].strip()):  # elsewhere it is an apostrophe
      quote = letter
    elif letter in BRACKETS:
      closers.append(BRACKETS[letter])
    elif closers and letter == closers[-1]:
      closers.pop()
    elif letter == "," and not closers:
      values.append(text[start:i].strip())
      start = i + 1
  if quote or closers:
    raise ValueError(f"{text[start:]} has no closing {quote or closers[-1]}")
  if "" in values:
    raise ValueError("a value is empty; write '' for an empty text")
  quoted = [len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" for value in values]
  return [value[1:-1] if bare else value for value, bare in zip(values, quoted, strict=True)]


def load(arguments: Sequence[str]) -> ml_collections.ConfigDict:
  """The config that experiments/run.py makes of these flags; UserError for a value of the wrong type."""
  own = flags.FlagValues()  # apart from those of this process
  argv = ["run.py", *arguments]
  config_flags.DEFINE_config_file("config", None, "", own, lock_config=True, sys_argv=argv)
  try:
    own(argv)
  except flags.Error as error:
    raise UserError(str(error).strip().splitlines()[-1]) from None
  return own["config"].value


def labels(fields: Sequence[str]) -> dict[str, str]:
  """Field -> its shortest end that no other of `fields` has, or all of it: config.train.steps -> steps."""
  ends = {field: [".".join(field.split(".")[-n:]) for n in range(1, field.count(".") + 2)] for field in fields}
  others = {field: {end for other in fields if other != field for end in ends[other]} for field in fields}
  return {field: next((end for end in ends[field] if end not in others[field]), field) for field in fields}


def name_of(values: Mapping[str, Any]) -> str:
  """ "activation=relu,steps=10": what a run is called, and its folder; other letters than those of paths become _."""
  named = zip(labels(list(values)).values(), values.values(), strict=True)
  whole = ",".join(f"{label}={re.sub(r'[^A-Za-z0-9._+-]+', '_', str(value)).strip('_')}" for label, value in named)
  digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
  return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 9]}-{digest}"


def title_of(values: Mapping[str, Any], fields: Sequence[str]) -> str:
  """The values of some of the swept fields, those that are no plain text with a label."""
  short = labels(list(values))
  shown = {field: values[field] for field in fields}
  return ", ".join(x if isinstance(x, str) and x else f"{short[field]}={x}" for field, x in shown.items())


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
  value = config
  for part in field.split(".")[1:]:
    value = value[part]
  return value
