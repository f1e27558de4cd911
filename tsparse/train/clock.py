"""How long steps take: tokens per second, the share of time spent on data, and a word on a step that took too long."""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator

import jax

SLOW = 10  # times the median
KNOWN = 8  # steps before there is a median to speak of
KEPT = 64  # steps that it is taken over
BLINK = 0.25  # seconds: what is over sooner is nobody's concern, and happens on any machine


class Clock:
  """Times the steps alone: `restart` leaves out what is done between them, and the first, which compiles, is left out.

  Tokens per second are smoothed over about 20 steps.
  """

  def __init__(self):
    self._last = self._seconds = None
    self._waited, self._logged = 0.0, time.monotonic()
    self._recent = collections.deque(maxlen=KEPT)

  def tick(self, tokens: float) -> tuple[float, tuple[float, float] | None]:
    """Counts a step of `tokens` tokens that is done.

    Returns:
      Tokens per second, 0 at the first step; and, of a step that took SLOW times the median, its seconds and the
      median's.
    """
    now = time.monotonic()
    slow = None
    if self._last is not None:
      seconds = now - self._last
      self._seconds = 0.95 * self._seconds + 0.05 * seconds if self._seconds else seconds
      median = statistics.median(self._recent) if len(self._recent) >= KNOWN else float("inf")
      slow = (seconds, median) if seconds > max(SLOW * median, BLINK) else None
      self._recent.append(seconds)
    self._last = now
    return tokens / self._seconds if self._seconds else 0.0, slow

  def restart(self):
    """Leaves out the time since the last tick: an evaluation or a checkpoint."""
    self._last = time.monotonic()

  @contextlib.contextmanager
  def waiting(self, running: jax.Array | None) -> Iterator[None]:
    """A context that gets the next batch. Its time counts unless the step before outlasts it, and so hides it.

    Args:
      running: a result of the step that was dispatched last; None where there is nothing to hide behind.
    """
    entered = time.monotonic()
    yield
    if running is None or running.is_ready():
      self._waited += time.monotonic() - entered

  def waited_fraction(self) -> float:
    """Share of the time since the last call in which the devices may have waited for data, at most."""
    now = time.monotonic()
    fraction = self._waited / (now - self._logged)
    self._waited, self._logged = 0.0, now
    return fraction
