"""Packing of documents into rows of fixed length, in plain numpy.

A document's tokens t_1 .. t_n (EOS last) are the targets and BOS, t_1 .. t_{n-1} the inputs: each is predicted once.
Where documents begin without BOS, t_1 is context that nothing predicts: the inputs are t_1 .. t_{n-1} and the targets
t_2 .. t_n.
"""

import base64
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KEYS = ("inputs", "targets", "segment_ids", "positions", "loss_mask")


class Piece(NamedTuple):
  """Tokens of a document: all, or the next of one that is too long to be encoded at once (`encoding.Encoder`).

  Attributes:
    tokens: int32 [n], the targets.
    mask: int32 [n], 1 where the target counts in the loss; None where all do.
    context: the token before them in their document; None at its beginning, where it is BOS, if there is one.
    ends: whether they are the last of their document.
  """

  tokens: np.ndarray
  mask: np.ndarray | None = None
  context: int | None = None
  ends: bool = True


class Packer:
  """Lays documents end to end and cuts them into rows.

  With `split_documents` (training) a document that the row's end cuts goes on in the next row, as a new segment whose
  first input is its true previous token: no token is lost and no place is empty. So does the next piece of a document
  that comes in pieces. Without (evaluation), a document that
  does not fit the rest of a row starts the next one; only a document longer than a row is cut, into whole rows.

  Attributes:
    documents: how many were begun.
    targets: how many targets their pieces gave so far, packed or not.
    document_ids: int32 [T], the document of each target of the last row, counted from 1; 0 is padding.
  """

  def __init__(self, pieces: Iterator[Piece], seq_len: int, bos: int | None, *, split_documents: bool):
    """`bos` stands before every document; with None its own first token does."""
    self._pieces = pieces
    self._seq_len = seq_len
    self._bos = bos
    self._split_documents = split_documents
    self._positions = np.arange(seq_len, dtype=np.int32)
    self._pending = np.zeros([1], np.int32)  # one token of context, then the tokens still to be predicted
    self._mask = np.zeros([0], np.int32)  # of the latter
    self._ended = True  # the document of the last piece
    self.documents = self.targets = 0
    self.document_ids = np.zeros([seq_len], np.int32)

  def next_row(self) -> dict[str, np.ndarray]:
    """The next row, int32 [T] each: `inputs`, `targets`, `segment_ids`, `positions`, `loss_mask`.

    Segments count from 1 in each row, 0 is padding; positions count from 0 in each segment; the mask is 1 where the
    target counts in the loss.

    Raises:
      StopIteration: all documents are packed.
    """
    row = {key: np.zeros([self._seq_len], np.int32) for key in KEYS}
    self.document_ids = np.zeros([self._seq_len], np.int32)
    filled = segment = 0
    while filled < self._seq_len and self._fill():
      left, room = len(self._mask), self._seq_len - filled
      if not self._split_documents and filled and left > room:
        break
      size, segment = min(left, room), segment + 1
      place = slice(filled, filled + size)
      row["inputs"][place] = self._pending[:size]
      row["targets"][place] = self._pending[1 : size + 1]
      row["segment_ids"][place] = segment
      row["positions"][place] = self._positions[:size]  # arange would let go of Python's lock, and wait for it
      row["loss_mask"][place] = self._mask[:size]
      self.document_ids[place] = self.documents
      self._pending, self._mask = self._pending[size:], self._mask[size:]
      filled += size
    if not filled:
      raise StopIteration
    return row

  def _fill(self) -> bool:
    """Has something pending; False after the last document."""
    while not len(self._mask):
      piece = next(self._pieces, None)
      if piece is None:
        return False
      piece = piece if self._bos is not None else first_as_context(piece)
      self._pending = np.empty(1 + len(piece.tokens), np.int32)
      self._pending[0] = self._bos if piece.context is None else piece.context
      self._pending[1:] = piece.tokens
      self._mask = np.ones(len(piece.tokens), np.int32) if piece.mask is None else np.asarray(piece.mask, np.int32)
      self.documents, self._ended = self.documents + self._ended, piece.ends
      self.targets += len(self._mask)
    return True

  def state(self) -> dict[str, Any]:
    """What is still to be predicted of the current document, as JSON."""
    mask = None if self._mask.all() else _text(self._mask)
    return {"pending": _text(self._pending), "mask": mask}

  def restore(self, state: dict[str, Any]):
    """Continues from `state`; the pieces must continue from where they were then."""
    self._pending = _array(state["pending"])
    self._mask = np.ones(len(self._pending) - 1, np.int32) if state["mask"] is None else _array(state["mask"])


def first_as_context(piece: Piece) -> Piece:
  """The piece of a document that begins without BOS: of its first one, the first token is the context."""
  if piece.context is not None or not len(piece.tokens):
    return piece
  mask = None if piece.mask is None else piece.mask[1:]
  return piece._replace(tokens=piece.tokens[1:], mask=mask, context=int(piece.tokens[0]))


def piece_state(piece: Piece) -> list[Any]:
  """A piece as JSON."""
  return [_text(piece.tokens), None if piece.mask is None else _text(piece.mask), piece.context, piece.ends]


def restored_piece(state: list[Any]) -> Piece:
  """The piece of a `piece_state`."""
  tokens, mask, context, ends = state
  return Piece(_array(tokens), None if mask is None else _array(mask), context, ends)


def _text(x: np.ndarray) -> str:
  return base64.b64encode(x.astype("<i4").tobytes()).decode()


def _array(text: str) -> np.ndarray:
  return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int32)


def stack_rows(rows: list[dict[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
  """int32 [B, T] arrays of at most B rows; the missing ones are empty (segment 0)."""
  seq_len = len(rows[0]["targets"])
  batch = {key: np.zeros([batch_size, seq_len], np.int32) for key in KEYS}
  for number, row in enumerate(rows):
    for key in KEYS:
      batch[key][number] = row[key]
  return batch
