"""What is kept of a step whose loss or gradient is not finite.

WORKDIR/failure/
  config.json, checkpoints/   a workdir: parameters, optimizer and data position before that step
  batch.npz                   its batch, [B, T] int32 each
  metrics.json                its metrics, and whether it failed again when it was repeated

Nothing is kept in advance. Training is deterministic, so the steps since the last checkpoint are repeated.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tsparse import files, hosts, sharding
from tsparse.data import merge_positions
from tsparse.train import checkpoint


def is_finite(metrics: Mapping[str, Any]) -> bool:
  """Whether the loss of a step, unless no token is scored, and its gradient are finite."""
  known = math.isfinite(metrics["loss"]) or metrics["scored_tokens"] == 0
  return known and math.isfinite(metrics["grad_norm"])


class NotFinite(Exception):
  """Ends the loop at a step, with the metrics of it."""

  def __init__(self, step: int, metrics: Mapping[str, Any]):
    super().__init__(step)
    self.step, self.metrics = step, metrics


@dataclasses.dataclass(frozen=True)
class BadStep:
  """A step whose loss or gradient is not finite."""

  step: int
  metrics: Mapping[str, Any]


def keep(workdir: Path, start: Any, train_step: Callable, mesh: jax.sharding.Mesh, bad: BadStep) -> str:
  """Repeats training up to the bad step and writes WORKDIR/failure; returns sentences that say where and how to look.

  Args:
    workdir: of the run.
    start: where to repeat from (`loop.Start`); its state is donated.
    train_step: compiled, (state, batch) -> (state, metrics).
    mesh: the devices, set by `jax.set_mesh`.
    bad: the step.
  """
  folder = workdir / "failure"
  scratch = workdir / ".failure"  # one process writes a workdir at a time
  state, start.state, tokens_seen = start.state, None, start.tokens_seen
  for _ in range(start.step + 1, bad.step):
    batch = sharding.place(next(start.data), mesh)
    tokens_seen += batch["targets"].size
    state, _ = train_step(state, batch)
  position = merge_positions(hosts.gather(start.data.state()))
  batch = sharding.place(next(start.data), mesh)
  try:
    hosts.on_main(lambda: _begin(workdir, scratch))
    with checkpoint.manager(scratch, keep=1) as checkpoints:
      checkpoint.save(checkpoints, state, position, tokens_seen)
    _, again = train_step(state, batch)
    repeated = not is_finite(again)
    rows = hosts.whole(batch)
    hosts.on_main(lambda: _finish(scratch, folder, rows, {**bad.metrics, "step": bad.step, "repeated": repeated}))
  except Exception as error:  # the run has failed already: that is what must be told
    with contextlib.suppress(OSError):
      shutil.rmtree(scratch)
    return f"What is needed to look at it could not be written to {folder} ({error})."
  where = (
    f"{folder} is a workdir with the parameters and the optimizer before that step (experiments/analyze.py "
    f"--model={folder} opens it), with its batch in batch.npz and its metrics in metrics.json."
  )
  return where if repeated else f"{where} When it was repeated the step was finite: suspect the machine."


def _begin(workdir: Path, scratch: Path):
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  shutil.copy(workdir / "config.json", scratch)


def _finish(scratch: Path, folder: Path, batch: Mapping[str, np.ndarray], metrics: Mapping[str, Any]):
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **batch)
  files.write(scratch / "batch.npz", buffer.getvalue())
  plain = {name: np.asarray(x).tolist() for name, x in metrics.items()}
  files.write(scratch / "metrics.json", json.dumps(_named(plain), indent=2) + "\n")
  old = folder.with_name(f".failure.old.{os.getpid()}")
  if folder.exists():  # of the same experiment, which failed there before
    folder.rename(old)
  scratch.rename(folder)
  shutil.rmtree(old, ignore_errors=True)


def _named(value: Any) -> Any:
  """`value` with "nan", "inf" and "-inf" for the numbers that JSON lacks and that matter here."""
  if isinstance(value, dict):
    return {name: _named(x) for name, x in value.items()}
  if isinstance(value, list):
    return [_named(x) for x in value]
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
