"""A workdir: the record of one experiment. Its config.json says which one, and no other may write there.

config.json        the resolved config; `--config=configs/repeat.py:WORKDIR` runs it again elsewhere
environment.json   versions, git revision, device and command, one entry for each start
checkpoints/  metrics.jsonl  tensorboard/  report/
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_collections

from tsparse import files
from tsparse.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "ml-collections", "numpy")


def read_config(workdir: Path) -> dict[str, Any]:
  """The resolved config of a workdir; UserError when the folder is not one."""
  path = workdir / "config.json"
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{workdir} is no workdir of tsparse (no config.json): give the folder a run wrote.") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}): give the folder of a whole run.") from None


def flatten(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
  """{"config.train.steps": 10, ...} of a nested dict."""
  flat = {}
  for key, value in tree.items():
    name = f"{prefix}.{key}"
    flat.update(flatten(value, name) if isinstance(value, dict) else {name: value})
  return flat


def claim(workdir: Path, config: ml_collections.ConfigDict):
  """Makes `workdir` the workdir of `config`, or confirms that it is.

  Raises:
    UserError: the folder cannot be written, or holds another config; then nothing was changed.
  """
  resolved = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    held = (workdir / "config.json").exists()
    if not held:
      files.write(workdir / "config.json", files.to_json(resolved))
    elif not os.access(workdir, os.W_OK):
      raise PermissionError("the folder is read-only")
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"workdir {workdir} cannot be written ({reason}): give another --workdir.") from None
  if held:
    old, new = flatten(read_config(workdir)), flatten(resolved)
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
      shown = ", ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed[:4])
      more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
      raise UserError(
        f"workdir {workdir} holds another experiment ({shown}{more}): give another --workdir, or the same config to "
        "resume."
      )
  record_environment(workdir)


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
    "command": " ".join(sys.argv),
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
