"""Progress of long work."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
  BarColumn,
  DownloadColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)


class ProgressLine:
  """A progress bar on a terminal; elsewhere a plain line at the start, at the end and at most every 10 seconds."""

  def __init__(self, console: Console, title: str, done: int, total: float):
    self._console, self._title, self._total, self._printed = console, title, total, -math.inf
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=None),
      *self._columns(),
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

  def advance(self, facts: str = "", amount: float = 1):
    """Shows that one more is done, or `amount` more."""
    self.update(self._bar.tasks[0].completed + amount, facts)

  def update(self, done: float, facts: str):
    """Shows that `done` of the total are done, with `facts` (loss and so on) beside it."""
    self._bar.update(self._task, completed=done, facts=facts)
    now = time.monotonic()
    if not self._console.is_terminal and (now - self._printed > 10 or math.isclose(done, self._total)):
      self._printed = now
      self._console.print(f"{self._title}  {self._amounts(done)}  {facts}".rstrip(), highlight=False)

  def _columns(self) -> list:
    return [MofNCompleteColumn()]

  def _amounts(self, done: float) -> str:
    return f"{done:.0f}/{self._total:.0f}"


class ByteProgressLine(ProgressLine):
  """The same for work that is counted in bytes, with its speed."""

  def __init__(self, console: Console, title: str, total: int):
    super().__init__(console, title, 0, total)
    self._start = time.monotonic()

  def _columns(self) -> list:
    return [DownloadColumn(), TransferSpeedColumn()]

  def _amounts(self, done: int) -> str:
    speed = done / max(1e-9, time.monotonic() - self._start)
    return f"{decimal(done)} of {decimal(self._total)}  {decimal(int(speed))}/s"


def warn(console: Console, sentence: str):
  """Shows a warning, on one line and as it is."""
  console.print(f"warning: {sentence}", highlight=False, soft_wrap=True, markup=False)


class Compiling:
  """Says on a terminal that programs are compiled, until text begins to come, and counts how long that takes.

  Attributes:
    seconds: that XLA compiled so far, while this was open.
  """

  def __init__(self, console: Console | None = None):
    """`console` is that of stderr by default."""
    self.seconds = 0.0
    self._status = (console or Console(stderr=True)).status("compiling")
    self._held: list[Callable[[], None]] | None = []  # None once text comes

  def __enter__(self) -> "Compiling":
    import jax  # here: progress of what needs no JAX is shown without it

    jax.monitoring.register_event_duration_secs_listener(self._count)
    self._status.start()
    return self

  def __exit__(self, *_):
    import jax

    jax.monitoring.unregister_event_duration_listener(self._count)
    self._release()

  def after(self, show: Callable[..., None]) -> Callable[..., None]:
    """`show`, whose first call is held back until the second: before it the step of a single token is compiled."""

    def held(*arguments: Any):
      if self._held is None:
        show(*arguments)
        return
      self._held.append(functools.partial(show, *arguments))
      if len(self._held) > 1:
        self._release()

    return held

  def _release(self):
    self._status.stop()
    for call in self._held or ():
      call()
    self._held = None

  def _count(self, event: str, seconds: float, **_: Any):
    if event == "/jax/core/compile/backend_compile_duration":
      self.seconds += seconds
