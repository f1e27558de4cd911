"""Lanes: the independent readers that make a batch.

The B rows of every batch are made by S lanes; lane j makes the rows j B/S .. (j+1) B/S - 1. A lane has its own
documents of every source, and its own packer, and knows nothing of the others. So the sequence of batches depends on
the seed and the config, never on how many hosts or threads read it: a host runs the lanes of the rows that its devices
need, and the position in the data is that of all lanes.

The share of a source is its share of the TOKENS drawn, EOS included (the percentages of Table 4 of Turbo Sparse are
read so). A lane takes its next document from the source whose tokens are furthest below their share:

  argmax_i  c_i + w_i (n + 1) - n_i       n_i tokens of source i, n = sum n_i, w_i its weight, sum w_i = 1

so that n_i - w_i n stays within a few documents, for ever. A document that is long enough to come in pieces lets the
others have their turn after each. The start c_i in (-l_i, 0], l_i the mean length of i's
documents, is random in each lane: else all lanes would draw the same sources, the longest documents first, in step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tsparse.data.packing import Packer, Piece
from tsparse.data.streams import Stream


class Mixer:
  """Draws documents from several streams in the shares `weights`, of a lane; iterates over (which stream, Piece)."""

  def __init__(
    self,
    streams: Sequence[Stream],
    weights: Sequence[float],
    lengths: Sequence[float],
    key: Sequence[int],
    check: Callable[[np.ndarray], None] = lambda ids: None,
  ):
    """`lengths` are the mean tokens of the documents, roughly; `key` is the seed of the start; `check` is called with
    the ids of each piece, and raises where they are not those of the model."""
    self.streams, self._check = streams, check
    self._weights = list(weights)
    self._start = (-np.random.default_rng(key).random(len(streams)) * np.asarray(lengths, np.float64)).tolist()
    self.drawn = [0] * len(streams)  # tokens
    self._open = [number for number, weight in enumerate(weights) if weight > 0]  # streams that may have more

  def __iter__(self) -> Iterator[tuple[int, Piece]]:
    return self

  def __next__(self) -> tuple[int, Piece]:
    while self._open:
      chosen = self._furthest_below()
      piece = self.streams[chosen].next_piece()
      if piece is None:
        self._open.remove(chosen)
        continue
      self._check(piece.tokens)
      self.drawn[chosen] += len(piece.tokens)
      return chosen, piece
    raise StopIteration

  def _furthest_below(self) -> int:
    after = sum(self.drawn) + 1
    return max(self._open, key=lambda i: self._start[i] + self._weights[i] * after - self.drawn[i])

  def state(self) -> dict[str, Any]:
    """The position, as JSON. Only endless streams have one."""
    return {"drawn": list(self.drawn), "streams": [stream.state() for stream in self.streams]}

  def restore(self, state: dict[str, Any]):
    """Continues from `state`."""
    self.drawn = list(state["drawn"])
    for stream, position in zip(self.streams, state["streams"], strict=True):
      stream.restore(position)


class Lane:
  """One lane of training: endless rows."""

  def __init__(self, mixer: Mixer, seq_len: int, bos: int | None):
    self.mixer = mixer
    self._packer = Packer((piece for _, piece in mixer), seq_len, bos, split_documents=True)

  def next_row(self) -> dict[str, np.ndarray]:
    """See `Packer.next_row`; every place is filled."""
    return self._packer.next_row()

  def state(self) -> dict[str, Any]:
    """The position, as JSON."""
    return {**self.mixer.state(), "packer": self._packer.state()}

  def restore(self, state: dict[str, Any]):
    """Continues from `state`."""
    self.mixer.restore(state)
    self._packer.restore(state["packer"])
