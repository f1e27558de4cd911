"""Where training reports: metrics.jsonl and TensorBoard, and Weights & Biases where config.wandb names a project."""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tsparse.files import strict, write
from tsparse.train.tracker import Tracker


class MetricWriter:
  """Appends one line of JSON per call to metrics.jsonl, and its scalars to TensorBoard and to a tracker.

  A run that resumes at `step` drops what an interrupted run had written of later steps, so that every step is there
  once. A full disk does not end a run: lines wait in memory until they can be written; TensorBoard misses them.
  """

  def __init__(self, workdir: Path, step: int, warn: Callable[[str], None], tracker: Tracker | None = None):
    self._path, self._warn, self._tracker = workdir / "metrics.jsonl", warn, tracker
    if self._path.exists():
      # the last line may be half of one, if the run was killed while writing it
      lines = [line for line in self._path.read_text().splitlines() if line.endswith("}")]
      kept = [line for line in lines if json.loads(line)["step"] <= step]
      write(self._path, "".join(line + "\n" for line in kept))
    self._waiting, self._failing = b"", False
    self._board = Board(workdir / "tensorboard", step + 1)

  def write(self, step: int, metrics: Mapping[str, Any]):
    """Records `metrics` (numbers and arrays) of `step`."""
    metrics = strict(metrics)
    scalars = {name: x for name, x in metrics.items() if isinstance(x, (int, float))}
    if self._tracker:
      self._tracker.write(step, scalars)
    self._waiting += (json.dumps({"step": step, **metrics}) + "\n").encode()
    try:
      self._write_lines()
      self._board.write(step, scalars)
      self._failing = False
    except OSError as error:
      self._board.forget()
      if not self._failing:
        self._warn(f"metrics of step {step} could not be written ({error.strerror or error}); training goes on.")
      self._failing = True

  def close(self):
    """Ends all, with a warning where lines of metrics.jsonl are lost."""
    self._board.forget()
    try:
      self._write_lines()
    except OSError as error:
      lost = self._waiting.count(b"\n")
      self._warn(f"the last {lost} lines of {self._path} could not be written ({error.strerror or error}).")
    if self._tracker:
      self._tracker.close()

  def _write_lines(self):
    if self._waiting:
      with self._path.open("ab", buffering=0) as file:  # unbuffered: what is not written stays in our hands
        while self._waiting:
          self._waiting = self._waiting[file.write(self._waiting) :]


def unscored(line: Mapping[str, Any]) -> bool:
  """Whether a line of metrics.jsonl is that of a step without a scored token, which has no loss."""
  return line.get("scored_tokens") == 0


def count_unscored(workdir: Path) -> int:
  """How many such steps a training has had: each has its line in metrics.jsonl."""
  return sum(map(unscored, _lines(workdir)))


def _lines(workdir: Path) -> list[dict[str, Any]]:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.is_file() else []
  return [json.loads(line) for line in lines if line.endswith("}")]


def final_loss(workdir: Path, step: int, share: float = 0.05) -> float | None:
  """Mean training loss of the last `share` of the steps up to `step`, those of metrics.jsonl; None if it has none.

  Steps without a scored token are left out.
  """
  known = [line for line in _lines(workdir) if "loss" in line and not unscored(line)]
  losses = [line["loss"] for line in known if (1 - share) * step <= line["step"] <= step]
  return sum(losses) / len(losses) if losses and None not in losses else None


TRACED = (
  "step", "loss", "zero_fraction", "zeros_wanted", "penalty_weight", "sparsity_penalty", "distillation", "matching",
  "swap_share",
)  # fmt: skip


def trace(workdir: Path, points: int = 200) -> dict[str, list]:
  """What a recipe did, from metrics.jsonl: metric -> its values at up to about `points` steps, "step" among them.

  Steps without a scored token are left out.
  """
  lines = [line for line in _lines(workdir) if "loss" in line and not unscored(line)]
  lines = lines[:: max(1, len(lines) // points)]
  return {name: [line[name] for line in lines] for name in TRACED if lines and all(name in line for line in lines)}


class Board:
  """TensorBoard's files, written at once: tensorboardX's own thread dies on a full disk, and its queue then blocks."""

  def __init__(self, folder: Path, first_step: int):
    import tensorboardX  # imports torch where that is installed: seconds, which no step should wait for

    self._tensorboard = tensorboardX
    self._folder, self._first_step = folder, first_step
    self._files, self._numbers = None, itertools.count()

  def write(self, step: int, scalars: Mapping[str, float]):
    """Records numbers of `step`. OSError where they cannot be; the next call then begins another file."""
    events, scalar = self._tensorboard.proto.event_pb2, self._tensorboard.summary.scalar
    if self._files is None:
      self._folder.mkdir(exist_ok=True)
      self._files = self._tensorboard.event_file_writer.EventsWriter(
        str(self._folder / "events"), f".{next(self._numbers)}"
      )
      if self._first_step:  # hides what an interrupted run wrote of later steps
        start = events.SessionLog(status=events.SessionLog.START)
        self._files.write_event(events.Event(step=self._first_step, session_log=start, wall_time=time.time()))
        self._first_step = 0
    for name, value in scalars.items():
      self._files.write_event(events.Event(step=step, summary=scalar(name, value), wall_time=time.time()))
    self._files.flush()

  def forget(self):
    """Closes the file, whatever comes of it."""
    files, self._files = self._files, None
    if files is not None:
      with contextlib.suppress(OSError):  # said when it was written to
        files.close()
