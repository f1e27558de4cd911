"""Weights & Biases, where config.wandb names a project: the numbers of metrics.jsonl, one W&B run for each workdir.

WORKDIR/wandb.json   its id there: when training goes on, so does the W&B run, and steps it knows are left as they are
WORKDIR/wandb/       its files; with WANDB_MODE=offline they wait there for `wandb sync`
"""

import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_collections

from tsparse import files
from tsparse.errors import UserError


def check_installed(project: str):
  """Raises UserError when there is a project and no wandb."""
  if project and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"config.wandb is {project!r} and the package wandb is not installed: pip install -r requirements-wandb.txt, or "
      "leave config.wandb empty."
    )


class Tracker:
  """A W&B run; one that cannot be begun, or fails, is told once and training goes on without it."""

  def __init__(self, workdir: Path, config: ml_collections.ConfigDict, warn: Callable[[str], None]):
    """Begins the run of `workdir`, or goes on with it; UserError where W&B cannot be used as it is set up here."""
    import wandb

    self._warn, self._run, self._error = warn, None, wandb.errors.Error
    path = workdir / "wandb.json"
    if not path.exists():
      files.write(path, files.to_json({"id": secrets.token_hex(8)}))
    offline = wandb.setup().settings.mode == "offline"  # where there is nothing to go on with
    try:
      self._run = wandb.init(
        project=config.wandb,
        id=json.loads(path.read_text())["id"],
        resume=None if offline else "allow",
        name=str(workdir),
        group=config.name,
        dir=str(workdir),
        config=config.to_dict(),
        settings=wandb.Settings(silent=True, console="off"),
      )
    except wandb.errors.UsageError as error:  # no API key, say
      raise UserError(
        f"config.wandb is {config.wandb!r} and Weights & Biases cannot be used ({_sentence(error)}): run `wandb "
        "login`, or set WANDB_MODE=offline, or leave config.wandb empty."
      ) from None
    except wandb.errors.Error as error:
      warn(f"Weights & Biases cannot be reached ({_sentence(error)}); training goes on without it.")

  def write(self, step: int, scalars: Mapping[str, float]):
    """Records numbers of `step`."""
    if self._run:
      try:
        self._run.log(dict(scalars), step=step)
      except self._error as error:
        self._warn(f"Weights & Biases takes no more ({_sentence(error)}); training goes on without it.")
        self._run = None

  def close(self):
    """Sends what is left."""
    if self._run:
      self._run.finish()


def _sentence(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
