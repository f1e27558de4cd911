"""Saves that may fail: training goes on until the next, and only the last one must succeed."""

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp

from tsparse import hosts
from tsparse.errors import RunFailure
from tsparse.train import checkpoint, resume
from tsparse.train.step import TrainState


class Saver:
  """Writes the checkpoints of a workdir in the background; a context, which waits for the last.

  An error of a save comes up while it is started or while it is written; either way it is told by `warn`, and the next
  save begins anew.
  """

  def __init__(self, workdir: Path, keep: int, keep_every: int, warn: Callable[[str], None]):
    self._workdir, self._keep, self._keep_every, self._warn = workdir, keep, keep_every, warn
    self._manager: ocp.CheckpointManager | None = None
    self._writing: int | None = None  # the step that is being written
    self._failed: str | None = None  # why the save before did, if it did

  def __enter__(self) -> "Saver":
    with contextlib.suppress(Exception):  # it comes up again at the first save
      self._open()
    return self

  def __exit__(self, *_):
    self._settle()
    self._close()

  def save(self, state: TrainState, position: bytes, tokens_seen: int):
    """Starts writing a checkpoint, as `checkpoint.save`; says so where it cannot."""
    self._settle()
    step, error = int(state.step), None
    try:
      hosts.on_main(self._probe)
      self._open()
      checkpoint.save(self._manager, state, position, tokens_seen)
    except Exception as raised:  # a disk has many ways to fail, and none is worth the run
      error = raised
    self._conclude(step, error)
    self._writing = None if self._failed else step

  def poll(self):
    """Says so when the save that was being written has failed meanwhile."""
    if self._writing is not None and not hosts.several() and not self._manager.is_saving_in_progress():
      self._settle()

  def finish(self):
    """Waits for the last save; RunFailure when it failed."""
    self._settle()
    if self._failed:
      raise RunFailure(
        f"{self._failed} It was the last: make room or mend the folder, then the same command goes on from the "
        "checkpoint before."
      )

  def _settle(self):
    """Waits for the save that is being written."""
    if self._writing is None:
      return
    step, self._writing, error = self._writing, None, None
    try:
      self._manager.wait_until_finished()
      self._manager.reload()
      if step not in self._manager.all_steps():
        raise OSError("it is not there after having been written")
      if hosts.is_main():
        resume.record(self._workdir, step)
    except Exception as raised:
      error = raised
    self._conclude(step, error)

  def _conclude(self, step: int, error: Exception | None):
    self._failed = None
    if hosts.any_host(error is not None):
      reason = _reason(error) if error else "on another host"
      self._failed = f"the checkpoint of step {step} could not be saved in {self._workdir} ({reason})."
      self._warn(f"{self._failed} Training goes on, and saves again at the next.")
      self._close()
      hosts.on_main(self._clear)

  def _probe(self):
    """OSError where the folder cannot be written: found out before the hosts wait for each other in Orbax."""
    folder = self._workdir / "checkpoints"
    folder.mkdir(exist_ok=True)
    probe = folder / ".probe"
    probe.touch()
    probe.unlink()

  def _clear(self):
    """Removes what failed saves have written, which takes room, as far as no thread still writes there.

    Opening a manager removes it too, the rest included, but in a thread: two of them at once would fail.
    """
    for folder in (self._workdir / "checkpoints").glob(f"*{ocp.utils.TMP_DIR_SUFFIX}"):
      shutil.rmtree(folder, ignore_errors=True)

  def _open(self):
    if self._manager is None:
      self._manager = checkpoint.manager(self._workdir, self._keep, self._keep_every)

  def _close(self):
    manager, self._manager = self._manager, None
    if manager is not None:
      with contextlib.suppress(Exception):  # it was told when the save was settled
        manager.close()


def _reason(error: Exception) -> str:
  """What the system says of an error; TensorStore wraps that in the names of its own files."""
  line = str(error).partition("\n")[0]
  system = re.search(r": ([^:]+) \[os_error_code=", line)
  return system[1] if system else getattr(error, "strerror", None) or line
