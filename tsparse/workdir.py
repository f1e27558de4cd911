"""A workdir: the record of one experiment. Its config.json says which one, and no other may write there.

config.json        the resolved config; `--config=configs/repeat.py:WORKDIR` runs it again elsewhere
environment.json   versions, git revision, device and command, one entry for each start
tokenizer/         a copy of the vocabulary's files, unless it is bytes
analysis_size.json how much of the held-out text config.analysis.minutes allowed: a repeated analysis keeps to it
checkpoints/  metrics.jsonl  tensorboard/  report/
base/  phases/NAME/  workdirs of the other stages (tsparse/stages.py)
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_collections

from tsparse import files
from tsparse.data import tokenizer_files
from tsparse.data.encoding import tokenizer_digest
from tsparse.errors import UserError

VOCABULARY = "config.data.vocabulary"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "ml-collections", "numpy")


def local(name: str) -> Path:
  """The folder called `name`; UserError for a bucket, which pathlib would take for a folder of that name."""
  if "://" in name:
    raise UserError(
      f"--workdir={name} is no folder of this machine: mount the bucket and name its folder (docs/tpu.md)."
    )
  return Path(name)


def read_config(workdir: Path) -> dict[str, Any]:
  """The resolved config of a workdir; UserError when the folder is not one."""
  path = workdir / "config.json"
  try:
    fields = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{workdir} holds no model (no config.json): give a workdir or a Hugging Face folder.") from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({error}): give the folder of a whole run.") from None
  if not isinstance(fields, dict):
    raise UserError(f"{path} is not a JSON object: give a workdir or a Hugging Face folder.")
  return fields


def flatten(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
  """{"config.train.steps": 10, ...} of a nested dict."""
  flat = {}
  for key, value in tree.items():
    name = f"{prefix}.{key}"
    flat.update(flatten(value, name) if isinstance(value, dict) else {name: value})
  return flat


def defaults() -> dict[str, Any]:
  """Field -> what a config without it means, {"config.train.steps": 1000, ...}; models are of no preset."""
  from configs import default
  from tsparse.models.config import ModelConfig

  config = default.get_config()
  fields = [field for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING]
  config.model = {field.name: field.default for field in fields if field.name in config.model}
  config.data.bos = "on"  # there was no other way
  return flatten(_resolved(config))


def check_free(workdir: Path, config: ml_collections.ConfigDict):
  """Raises UserError when `workdir` holds another config than `config`.

  A field that the workdir's lacks was at its default: there was no such field yet. Another path of the tokenizer that
  was copied into the workdir is no other config.
  """
  if not (workdir / "config.json").exists():
    return
  new = flatten(_resolved(config))
  old = {name: x for name, x in defaults().items() if name in new} | flatten(read_config(workdir))
  changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
  if VOCABULARY in changed and _is_kept(workdir, old[VOCABULARY], new[VOCABULARY]):
    changed.remove(VOCABULARY)
  if changed:
    shown = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    raise UserError(
      f"workdir {workdir} holds another experiment ({shown}{more}): give another --workdir, or the same config to "
      "resume."
    )


def _is_kept(workdir: Path, old: str, new: str) -> bool:
  """Whether the vocabulary `new` is the one that `workdir` holds a copy of and knows as `old`."""
  copy = tokenizer_files.kept(old, workdir)
  try:
    return copy is not None and tokenizer_digest(new) == tokenizer_digest(copy)
  except UserError:
    return False


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Makes the folder and, while the context is open, this process the only one in it; UserError where it cannot."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / ".lock").open("w")
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"workdir {workdir} cannot be written ({reason}): give another --workdir.") from None
  with file:  # the kernel frees it however the process ends
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"workdir {workdir} is in use by another process: wait for it, or give another.") from None
    yield


@contextlib.contextmanager
def claim(workdir: Path, config: ml_collections.ConfigDict, like: Path | None = None) -> Iterator[None]:
  """Makes `workdir` the workdir of `config` and, while the context is open, this process its only writer.

  The tokenizer is copied into it first; a workdir `like` it shares its copy.

  Raises:
    UserError: the folder cannot be written, another process works there, or it holds another config or tokenizer.
  """
  with lock(workdir):
    check_free(workdir, config)
    if not (workdir / "config.json").exists():
      tokenizer_files.keep(config.data.vocabulary, workdir, like)
      files.write(workdir / "config.json", files.to_json(_resolved(config)))
    record_environment(workdir)
    yield


def _resolved(config: ml_collections.ConfigDict) -> dict[str, Any]:
  return json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file


def environment() -> dict[str, Any]:
  """Versions of Python and of the packages that decide the numbers, the git revision, the device and the command."""
  import jax

  def git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()

  try:
    revision = git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
  except FileNotFoundError:  # no git on this machine
    revision = ""
  device = jax.devices()[0]
  return {
    "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    "command": shlex.join(sys.argv),
    "git": revision or "unknown",
    "python": platform.python_version(),
    "versions": {name: metadata.version(name) for name in PACKAGES},
    "device": f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores, {platform.platform()}",
  }


def record_environment(workdir: Path):
  """Adds this start to environment.json."""
  path = workdir / "environment.json"
  starts = json.loads(path.read_text()) if path.exists() else []
  files.write(path, files.to_json([*starts, environment()]))
