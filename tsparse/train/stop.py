"""SIGTERM and SIGINT during training: the first asks it to stop after the step, the second ends the process."""

import signal
import threading

import jax
from rich.console import Console

from tsparse import hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """A context in which a signal is noted and shown; outside the main thread, which alone may, none is caught."""

  def __init__(self, mesh: jax.sharding.Mesh, console: Console):
    self._mesh, self._console = mesh, console
    self._received: signal.Signals | None = None
    self._ballot, self._before = None, {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  @property
  def signal(self) -> signal.Signals:
    """What this host received; SIGTERM where another host did."""
    return self._received or signal.SIGTERM

  def agreed(self) -> bool:
    """Whether to stop after the step that was dispatched last; to be called once after each, by all hosts alike.

    Of several hosts each hears of the others' signals one step later, and so all stop after the same step.
    """
    if not hosts.several():
      return self._received is not None
    ballot, self._ballot = self._ballot, hosts.vote(self._received is not None, self._mesh)
    return ballot is not None and bool(ballot)

  def _note(self, number: int, _frame):
    self._received = signal.Signals(number)
    for each in SIGNALS:
      signal.signal(each, signal.SIG_DFL)
    self._console.print(
      f"{self._received.name}: stopping after this step; the checkpoint is then saved. Once more ends it at once.",
      highlight=False,
    )
