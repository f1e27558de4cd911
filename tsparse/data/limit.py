"""The first documents that a mixer draws, up to a number of targets: what is evaluated on."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tsparse.data.lanes import Mixer
from tsparse.data.packing import Piece


class First:
  """The documents of the first `limit` targets that a mixer draws, each whole, but for those that the limit cuts.

  Where `bos` is None, the first token of a document is context and no target.

  Attributes, once all were given: `complete`, `cut` and `taken` of the `EvaluationSet`.
  """

  def __init__(self, mixer: Mixer, limit: int, bos: int | None):
    self._mixer, self._limit, self._first = mixer, limit, int(bos is None)
    self.complete, self.cut, self.taken = True, 0, ()

  def documents(self, given: Callable[[], int]) -> Iterator[Piece]:
    """The documents; `given` tells how many targets there are in those that were taken."""
    streams = self._mixer.streams
    parts: list[list[Piece]] = [[] for _ in streams]  # of the documents that are not whole yet
    unread = None  # the stream whose last document is not among the first
    for stream, piece in self._mixer:
      left = self._limit - given() - sum(sum(len(part.tokens) for part in each) - self._first for each in parts if each)
      room = left if parts[stream] else left + self._first
      self.complete = len(piece.tokens) <= room
      if left <= 0 and not self.complete:
        unread = stream if piece.context is None else None
        break
      parts[stream].append(piece._replace(tokens=piece.tokens[:room], mask=_mask(piece)[:room]))
      if not self.complete:
        break
      if piece.ends:
        yield _joined(parts[stream])
        parts[stream] = []
    for each in filter(None, parts):
      self.cut += 1
      yield _joined(each)
    self.taken = tuple(stream.taken - (number == unread) for number, stream in enumerate(streams))


def _mask(piece: Piece) -> np.ndarray:
  return np.ones(len(piece.tokens), np.int32) if piece.mask is None else piece.mask


def _joined(pieces: Sequence[Piece]) -> Piece:
  """A document of its pieces."""
  return Piece(np.concatenate([piece.tokens for piece in pieces]), np.concatenate([piece.mask for piece in pieces]))
