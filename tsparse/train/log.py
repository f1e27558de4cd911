"""Where training reports: a progress bar, metrics.jsonl and TensorBoard."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from tsparse.files import strict, write


class MetricWriter:
  """Appends one line of JSON per call to metrics.jsonl, and its scalars to TensorBoard.

  A run that resumes at `step` drops what an interrupted run had written of later steps, so that every step is there
  once.
  """

  def __init__(self, workdir: Path, step: int):
    path = workdir / "metrics.jsonl"
    if path.exists():
      # the last line may be half of one, if the run was killed while writing it
      lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
      kept = [line for line in lines if json.loads(line)["step"] <= step]
      write(path, "".join(line + "\n" for line in kept))
    self._file = path.open("a")
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

  def write(self, step: int, metrics: Mapping[str, Any]):
    """Records `metrics` (numbers and arrays) of `step`."""
    metrics = strict(metrics)
    self._file.write(json.dumps({"step": step, **metrics}) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      if isinstance(value, (int, float)):
        self._board.add_scalar(name, value, step)

  def close(self):
    """Flushes both."""
    self._file.close()
    self._board.close()


class ProgressLine:
  """A progress bar on a terminal; elsewhere a plain line at the start, at the end and at most every 10 seconds."""

  def __init__(self, console: Console, title: str, done: int, total: int):
    self._console, self._title, self._total, self._printed = console, title, total, -math.inf
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=None),
      MofNCompleteColumn(),
      TextColumn("{task.fields[facts]}"),
      TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self._task = self._bar.add_task(title, total=total, completed=done, facts="")

  def __enter__(self) -> "ProgressLine":
    self._bar.start()
    return self

  def __exit__(self, *_):
    self._bar.stop()

  def update(self, done: int, facts: str):
    """Shows that `done` of the total are done, with `facts` (loss and so on) beside it."""
    self._bar.update(self._task, completed=done, facts=facts)
    now = time.monotonic()
    if not self._console.is_terminal and (now - self._printed > 10 or done == self._total):
      self._printed = now
      self._console.print(f"{self._title}  {done}/{self._total}  {facts}", highlight=False)
