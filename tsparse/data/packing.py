"""Packing of documents into rows of fixed length, in plain numpy.

A document's tokens t_1 .. t_n (EOS last) are the targets and BOS, t_1 .. t_{n-1} the inputs: each is predicted once.
"""

from collections.abc import Iterator

import numpy as np

KEYS = ("inputs", "targets", "segment_ids", "positions")


class Packer:
  """Lays documents end to end and cuts them into rows.

  With `split_documents` (training) a document that the row's end cuts goes on in the next row, as a new segment whose
  first input is its true previous token: no token is lost and no place is empty. Without (evaluation), a document that
  does not fit the rest of a row starts the next one; only a document longer than a row is cut, into whole rows.
  """

  def __init__(self, documents: Iterator[np.ndarray], seq_len: int, bos: int, *, split_documents: bool):
    self._documents = documents
    self._seq_len = seq_len
    self._bos = bos
    self._split_documents = split_documents
    self._pending = np.zeros([0], np.int32)  # one token of context, then the tokens still to be predicted

  def next_row(self) -> dict[str, np.ndarray]:
    """The next row, int32 [T] each: `inputs`, `targets`, `segment_ids`, `positions`.

    Segments count from 1 in each row, 0 is padding; positions count from 0 in each segment.

    Raises:
      StopIteration: all documents are packed.
    """
    row = {key: np.zeros([self._seq_len], np.int32) for key in KEYS}
    filled = segment = 0
    while filled < self._seq_len:
      if len(self._pending) < 2:
        tokens = next(self._documents, None)
        if tokens is None:
          break
        self._pending = np.concatenate([[self._bos], tokens]).astype(np.int32)
        continue
      left, room = len(self._pending) - 1, self._seq_len - filled
      if not self._split_documents and filled and left > room:
        break
      size, segment = min(left, room), segment + 1
      place = slice(filled, filled + size)
      row["inputs"][place] = self._pending[:size]
      row["targets"][place] = self._pending[1 : size + 1]
      row["segment_ids"][place] = segment
      row["positions"][place] = np.arange(size)
      self._pending = self._pending[size:]
      filled += size
    if not filled:
      raise StopIteration
    return row

  def state(self) -> np.ndarray:
    """int32 [tokens still to be predicted of the current document + 1], or [0] or [1] between documents."""
    return self._pending.copy()

  def restore(self, state: np.ndarray):
    """Continues from `state`; the documents must continue from where they were then."""
    self._pending = np.asarray(state, np.int32)


def stack_rows(rows: list[dict[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
  """int32 [B, T] arrays of at most B rows; the missing ones are empty (segment 0)."""
  seq_len = len(rows[0]["targets"])
  batch = {key: np.zeros([batch_size, seq_len], np.int32) for key in KEYS}
  for number, row in enumerate(rows):
    for key in KEYS:
      batch[key][number] = row[key]
  return batch
