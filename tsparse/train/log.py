"""Where training reports: metrics.jsonl and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsparse.files import strict, write


class MetricWriter:
  """Appends one line of JSON per call to metrics.jsonl, and its scalars to TensorBoard.

  A run that resumes at `step` drops what an interrupted run had written of later steps, so that every step is there
  once.
  """

  def __init__(self, workdir: Path, step: int):
    from tensorboardX import SummaryWriter  # imports torch where that is installed

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
