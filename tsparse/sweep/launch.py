"""Runs as processes of this machine, several at a time; a signal stops them the way it stops one run."""

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from tsparse.errors import Stopped
from tsparse.progress import ProgressLine
from tsparse.sweep.runs import Run

RUN = Path(__file__).resolve().parents[2] / "experiments" / "run.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(runs: Sequence[Run], parallel: int, logs: Path, record: Callable[[Run, str, str], None], console: Console):
  """Starts each run that is not done, and waits for all; what a run prints is appended to LOGS/NAME.txt.

  Args:
    runs: of the sweep.
    parallel: how many run at a time.
    logs: a folder.
    record: called with a run, its state (running, done, stopped, failed) and, where it is not done, why not.
    console: where progress is shown.

  Raises:
    Stopped: a signal came. It was passed on to the runs, and they have ended.
  """
  waiting = deque(run for run in runs if run.state != "done")
  running: dict[subprocess.Popen, tuple[Run, float]] = {}
  done = len(runs) - len(waiting)
  with _PassedOn(running) as received, ProgressLine(console, "sweep", done, len(runs)) as bar:
    while running or (waiting and not received):
      while waiting and len(running) < parallel and not received:
        run = waiting.popleft()
        console.print(
          f"{run.name}  {'goes on' if run.state == 'begun' else 'started'}",
          highlight=False,
          markup=False,
          soft_wrap=True,
        )
        record(run, "running", "")
        running[_start(run, logs)] = run, time.monotonic()
      bar.update(done, f"{len(running)} running")
      for process in [process for process in running if process.poll() is not None]:
        run, began = running.pop(process)
        state, why = outcome(run, process.returncode, logs)
        record(run, state, why)
        done += not received
        seconds = f"{time.monotonic() - began:.0f} s"
        console.print(
          f"{run.name}  {state} after {seconds}{why and f': {why}'}", highlight=False, markup=False, soft_wrap=True
        )
      time.sleep(0.05)
    if not received:
      bar.update(done, "")
  if received:
    finished = sum(run.state == "done" for run in runs)
    raise Stopped(
      f"{received[0].name}; {finished} of {len(runs)} runs are done, and the same command goes on from there.",
      0 if received[0] == signal.SIGTERM else 130,
    )


def outcome(run: Run, exit_code: int, logs: Path) -> tuple[str, str]:
  """How a run that has ended did end: its state, and a sentence where it is not done."""
  if exit_code == 0 and run.state == "done":
    return "done", ""
  lines = [line.strip() for line in (logs / f"{run.name}.txt").read_text(errors="replace").splitlines()]
  said = [line for line in lines if line.startswith(("error: ", "failed: ", "stopped: ", "interrupted"))] or lines
  stopped = exit_code in (0, 130) or -exit_code in SIGNALS
  killed = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
  last = said[-1] if said else "it printed nothing"
  return ("stopped" if stopped else "failed"), last if exit_code >= 0 else f"{killed}; its last words: {last}"


def _start(run: Run, logs: Path) -> subprocess.Popen:
  logs.mkdir(parents=True, exist_ok=True)
  with (logs / f"{run.name}.txt").open("ab") as log:
    return subprocess.Popen(
      [sys.executable, str(RUN), *run.arguments],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      process_group=0,  # Ctrl-C in a terminal reaches this process alone, which passes it on, once
      preexec_fn=_end_with_parent,
    )


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent():
  """Lets the kernel send SIGTERM to this child should its parent be killed: it saves itself and stops."""
  if LIBC:
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class _PassedOn(contextlib.AbstractContextManager):
  """A context in which SIGTERM and SIGINT go to the processes of `running`; gives the list of those received."""

  def __init__(self, running: dict[subprocess.Popen, tuple[Run, float]]):
    self._running, self._received = running, []

  def __enter__(self) -> list[signal.Signals]:
    self._before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
    return self._received

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _pass_on(self, number: int, _frame):
    self._received.append(signal.Signals(number))
    for process in list(self._running):
      process.send_signal(number)
