"""The documents of one source in their order, from any position: what a lane draws from.

Of S lanes, lane j takes the documents j, j + S, j + 2S, ... of one endless sequence: epoch after epoch of the source,
each in an order of its own. So the lanes are disjoint and together complete, however few documents there are.
"""

import base64
import collections
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from tsparse.data.chat import ChatEncoder, Conversation
from tsparse.data.encoding import Encoder
from tsparse.data.order import round_keys, shuffled
from tsparse.data.packing import Piece, piece_state, restored_piece
from tsparse.data.sources import Documents
from tsparse.data.tensorflow import load_tensorflow, silent_stderr
from tsparse.errors import UserError

# Cached documents for each lane, below which every lane reads all of them: there may be lanes without a file otherwise.
WHOLE = 64
EMPTY = 100_000  # documents without tokens, one after the other, after which a task is taken to hold nothing else
# Documents of a file that are read and encoded together, or as many as hold so many bytes: every call of a tokenizer
# costs some, and in short ones threads wait for Python's lock.
AHEAD, AHEAD_BYTES = 256, 131_072


class Stream(Protocol):
  """The documents of a source that one lane takes."""

  taken: int  # documents that were begun

  def next_piece(self) -> Piece | None:
    """The next tokens of the current document or of the next one; None after the last."""

  def skip(self, documents: int):
    """Leaves out so many documents, of a stream that gave none yet."""

  def state(self) -> Any:
    """The position, as JSON."""

  def restore(self, state: Any):
    """Continues from `state()` of a stream that was made with the same arguments."""


class FileStream:
  """Documents of files. The position is three numbers: documents taken, characters of the last one, its last token.

  Of a document without tokens there is no piece, and of one whose end has none (white space, to some tokenizers) the
  last piece is empty.

  A document is held whole as text while it is drawn, and encoded piece by piece. The next ones are read and encoded
  ahead, those after them by a thread meanwhile, which is not part of the position: nothing depends on how many.
  """

  def __init__(
    self,
    documents: Documents,
    encoder: Encoder | ChatEncoder,
    key: Sequence[int],
    lane: int,
    lanes: int,
    epochs: int | None = None,
  ):
    self._documents = documents
    self._encoder = encoder
    self._key = key
    self._lane, self._lanes = lane, lanes
    self._end = None if epochs is None else epochs * len(documents)
    self.taken = 0
    self._offset = 0  # in the document that was taken last; 0 where all of it was given
    self._last: int | None = None  # token before the offset; None where none was given
    self._document: str | Conversation = ""  # that document
    self._ahead: collections.deque = collections.deque()  # (document, its first piece) of the next ones
    self._coming: Future | None = None  # those after them

  def next_piece(self) -> Piece | None:
    """See `Stream`."""
    empty = 0  # documents without tokens, one after the other
    while empty <= len(self._documents):
      if self._offset == 0:
        if not self._ahead:
          self._ahead.extend(self._coming.result() if self._coming else self._read_ahead(self.taken))
          self._coming = _threads(os.getpid()).submit(self._read_ahead, self.taken + len(self._ahead))
        if not self._ahead:
          return None
        self._document, (tokens, mask, end) = self._ahead.popleft()
        self.taken, self._last = self.taken + 1, None
      else:
        tokens, mask, end = self._encoder.piece(self._document, self._offset)
      ends, context = end >= len(self._document), self._last
      self._offset = 0 if ends else end
      self._last = int(tokens[-1]) if len(tokens) else context
      if len(tokens) or (ends and context is not None):
        return Piece(tokens, mask, context, ends)
      empty += ends
    path = self._documents.files[0].path
    raise UserError(f"config.data.vocabulary gives no token for any document of {path}: set one made for such text.")

  def _read_ahead(self, taken: int) -> list[tuple[str | Conversation, tuple]]:
    first = self._lane + self._lanes * taken
    places = np.arange(first, first + self._lanes * AHEAD, self._lanes)
    numbers = self._numbers(places if self._end is None else places[places < self._end])
    enough = np.searchsorted(np.cumsum(self._documents.length[numbers]), AHEAD_BYTES)
    documents = self._read(numbers[: enough + 1])
    return list(zip(documents, self._encoder.first_pieces(documents), strict=True))

  def _numbers(self, places: np.ndarray) -> np.ndarray:
    """Which documents are at `places`, ascending [n], of the endless sequence; int64 [n]."""
    epochs, indices = np.divmod(places, len(self._documents))
    of_epoch = [
      shuffled(indices[epochs == epoch], len(self._documents), round_keys(*self._key, epoch))
      for epoch in dict.fromkeys(epochs.tolist())
    ]
    return np.concatenate([np.zeros(0, np.int64), *of_epoch])

  def _read(self, numbers: np.ndarray) -> list[str | Conversation]:
    return [self._encoder.open(text.decode()) for text in self._documents.read_all(numbers)]

  def skip(self, documents: int):
    """See `Stream`; none of them is read."""
    self.taken += documents

  def state(self) -> list[int | None]:
    """[documents taken, characters given of the last of them, last token given of it]."""
    return [self.taken, self._offset, self._last]

  def restore(self, state: list[int | None]):
    """See `Stream`."""
    self.taken, self._offset, self._last = state
    self._ahead.clear()
    self._coming = None
    if self._offset:
      (self._document,) = self._read(self._numbers(np.array([self._lane + self._lanes * (self.taken - 1)])))


@functools.lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
  """The threads that read ahead in this process; one that is forked has none of its parent's."""
  del process
  return ThreadPoolExecutor(os.cpu_count() or 1, "read-ahead")


class TaskStream:
  """Documents of a seqio task, in seqio's order of the shard `lane` of `lanes`, or every `lanes`-th of a small cache.

  The position is that of tf.data's iterator with all that its shuffle and prefetch buffers hold, megabytes for each
  lane: 4 to 6 MB were measured on 300 documents of 4 KB. Documents in files have three numbers instead. What is left
  of a document that is given in pieces is part of it too.
  """

  def __init__(
    self,
    task: Any,
    split: str,
    without_eos: int | None,
    seed: int,
    lane: int,
    lanes: int,
    epochs: int | None = None,
    cached: bool = False,
    size: int | None = None,
  ):
    """`cached`: reads the tokens that seqio's cache job wrote, see `tasks.check_cached`; `size`: tokens of a piece."""
    self._open: Callable[[], Any] = lambda: _iterate(task, split, seed, lane, lanes, epochs, cached)
    self._title, self._shard = f"The seqio task {task.name!r}: its", f"shard {lane} of {lanes}"
    self._endless = epochs is None
    self._without_eos = without_eos
    self._iterator: list[Any] = []
    self._size = size
    self._rest: Piece | None = None  # of the document that was taken last
    self.taken = 0
    self._started = False

  def next_piece(self) -> Piece | None:
    """See `Stream`."""
    piece, self._rest = self._rest or self._next_document(), None
    if piece is None or self._size is None or len(piece.tokens) <= self._size:
      return piece
    (tokens, after), last = np.split(piece.tokens, [self._size]), int(piece.tokens[self._size - 1])
    mask, mask_after = (None, None) if piece.mask is None else np.split(piece.mask, [self._size])
    self._rest = Piece(after, mask_after, last)
    return Piece(tokens, mask, piece.context, ends=False)

  def _next_document(self) -> Piece | None:
    # SentencePiece's TensorFlow kernel writes a notice when it first runs, and cannot be told not to.
    with contextlib.nullcontext() if self._started else silent_stderr():
      self._started = True
      for _ in range(EMPTY):
        example = next(self._tensorflow(), None)
        if example is None:
          if self._endless:
            raise UserError(
              f"{self._title} {self._shard} has no documents; read it by fewer lanes, --config.data.lanes, or give it "
              "more documents."
            )
          return None
        self.taken += 1
        tokens, mask = example["targets"], example.get("loss_mask")
        if mask is not None and len(mask) != len(tokens):
          raise UserError(
            f"{self._title} {self._shard} gave {len(tokens)} targets and {len(mask)} of loss_mask: make them as long."
          )
        if self._without_eos is not None and len(tokens) and tokens[-1] == self._without_eos:
          tokens, mask = tokens[:-1], None if mask is None else mask[:-1]
        if len(tokens):
          return Piece(tokens.astype(np.int32), None if mask is None else (mask > 0).astype(np.int32))
    raise UserError(f"{self._title} {self._shard} gave no token in {EMPTY:,} documents: give it documents with text.")

  def skip(self, documents: int):
    """See `Stream`."""
    while self.taken < documents and self.next_piece() is not None:
      self._rest = None

  def state(self) -> list[Any]:
    """[documents taken, [position of tf.data's iterator in base64, what is left of the last document]]."""
    if not self._started:
      return [0, ""]
    with silent_stderr():
      try:
        state = self._tensorflow().save()
      except load_tensorflow()[1].errors.OpError as e:
        raise UserError(
          f"{self._title} position cannot be saved ({e.message.strip()}), so that training on it could not be resumed; "
          "write its documents into files, or make its pipeline of stateless tf.data operations."
        ) from e
    position = base64.b64encode(state.numpy() if hasattr(state, "numpy") else state).decode()
    return [self.taken, [position, None if self._rest is None else piece_state(self._rest)]]

  def restore(self, state: list[Any]):
    """See `Stream`."""
    self.taken, position = state
    position, rest = (position, None) if isinstance(position, str) else position
    self._rest = None if rest is None else restored_piece(rest)
    if position:
      with silent_stderr():  # the kernels may run from here on
        self._started = True
        self._tensorflow().restore(base64.b64decode(position))

  def _tensorflow(self):
    if not self._iterator:
      # A list, so that it can be emptied at exit, before the interpreter is torn down: tf.data's threads may then be
      # waiting to call our Python reader, and the iterator's destructor would wait for them for ever.
      self._iterator.append(self._open())
      weakref.finalize(self, self._iterator.clear)
    return self._iterator[0]


def _iterate(task: Any, split: str, seed: int, lane: int, lanes: int, epochs: int | None, cached: bool):
  seqio, tf = load_tensorflow()
  whole = cached and task.get_cached_stats(split)["examples"] < WHOLE * lanes
  dataset = task.get_dataset(
    sequence_length=None,  # nothing is trimmed
    split=split,
    use_cached=cached,
    shuffle=True,
    seed=seed,
    shard_info=None if whole else seqio.ShardInfo(lane, lanes),
    num_epochs=epochs,
    try_in_mem_cache=False,  # the cache would be in every saved state, and would freeze the order of the first epoch
  )
  if whole:  # all lanes see the same order, which the seed fixes
    dataset = dataset.shard(lanes, lane)
  options = tf.data.Options()
  options.deterministic = True
  return dataset.with_options(options).as_numpy_iterator()
