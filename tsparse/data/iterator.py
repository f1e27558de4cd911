"""What training and evaluation see of the data: int32 [B, T] numpy arrays, and a position that can be saved."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tsparse.data import resolve, tasks
from tsparse.data.accounting import pack, unpack
from tsparse.data.chat import ENCODING, ChatEncoder
from tsparse.data.embedded import check_embedded, check_ids
from tsparse.data.encoding import first_token, load_tokenizer, make_encoder, tokenizer_digest
from tsparse.data.lanes import Lane, Mixer
from tsparse.data.leakage import check_disjoint
from tsparse.data.limit import First
from tsparse.data.packing import KEYS, Packer, stack_rows
from tsparse.data.resolve import Source
from tsparse.data.settings import DataSettings, data_settings, lanes_of
from tsparse.data.spool import Spool, spool
from tsparse.data.streams import FileStream, Stream, TaskStream
from tsparse.errors import UserError

EVALUATION_SEED = 0  # one fixed order for ever: losses of different runs are on the same documents
TASK_TOKENS = 1000.0  # of a document of a task: a guess, which only spreads the first documents of the lanes


def check_data(data: Any, model_vocab_size: int):
  """Finds all that can be wrong with the settings of the data before anything is trained.

  Args:
    data: `config.data`, see `settings.DataSettings`.
    model_vocab_size: rows of the model's embedding.

  Raises:
    UserError: unknown or missing D, unreadable or malformed file, weights that make no sense, no validation documents,
      too many documents on both sides (`leakage`), a vocabulary that cannot be loaded or is larger than the model's.
  """
  data = data_settings(data)
  tokenizer = load_tokenizer(data.vocabulary)
  check_embedded(tokenizer, model_vocab_size)
  first_token(tokenizer, data.bos)
  if data.skip_bad < 0:
    raise UserError(f"config.data.skip_bad is {data.skip_bad}; it must be at least 0.")
  if not 0 <= data.allow_overlap <= 1:
    raise UserError(
      f"config.data.allow_overlap is {data.allow_overlap}; it is a share of the held-out documents, from 0 to 1."
    )
  for source, _ in resolve.validation(data):
    if not source.documents:
      resolve.seqio_task(source, data.vocabulary)
  for source, split in resolve.training(data):
    if not source.documents or data.cached:  # of a task only its documents tell whether it works
      stream = _task_stream(source, split, data, 0, 0, data.lanes)
      stream.next_piece()
      stream.state()
  check_disjoint(data)


class TrainIterator:
  """Endless training batches, dicts of int32 [B, T]: `inputs`, `targets`, `segment_ids`, `positions`, `loss_mask`.

  Rows are full: see `tsparse.data.packing`. Only the lanes of `lanes` are read, each in a thread (tokenizers let go of
  Python's lock); the rows of the others are zeros.
  """

  def __init__(self, lanes: dict[int, Lane], shape: tuple[int, int], rows: int, fingerprint: dict, sources: list[dict]):
    self._lanes = lanes
    self._shape = shape
    self._rows = rows  # that a lane makes
    self._fingerprint = fingerprint
    self._sources = sources
    self._filled = self._places = 0
    self._threads = ThreadPoolExecutor(min(len(lanes), os.cpu_count() or 1), "lane")

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = {key: np.zeros(self._shape, np.int32) for key in KEYS}

    def fill(number: int):
      for place in range(number * self._rows, (number + 1) * self._rows):
        for key, values in self._lanes[number].next_row().items():
          batch[key][place] = values

    list(self._threads.map(fill, self._lanes))  # raises what a lane raises
    self._filled += int(np.count_nonzero(batch["segment_ids"]))
    self._places += len(self._lanes) * self._rows * self._shape[1]
    return batch

  @property
  def lanes(self) -> list[int]:
    """The lanes that are read here."""
    return list(self._lanes)

  def state(self) -> bytes:
    """The position of the lanes that are read here (`accounting.merge_positions` joins those of all hosts).

    `restore` of it continues bit for bit, in any process.
    """
    lanes = {str(number): lane.state() | {"taken": _taken(lane)} for number, lane in self._lanes.items()}
    return pack({"fingerprint": self._fingerprint, "sources": self._sources, "lanes": lanes})

  def restore(self, state: bytes):
    """Continues from the position of an iterator that was made with the same arguments, but for `rows`.

    Raises:
      UserError: the state is not one, belongs to other data or settings, or lacks lanes that are read here.
    """
    with _readable():
      saved = unpack(state)
      fingerprint, lanes = {"data.bos": "on"} | saved["fingerprint"], saved["lanes"]  # before there was a choice
    changed = [
      f"{key} was {fingerprint.get(key)} and is {self._fingerprint.get(key)}"
      for key in self._fingerprint | fingerprint
      if fingerprint.get(key) != self._fingerprint.get(key)
    ]
    if changed:
      raise UserError(
        f"The saved data position belongs to another run: {'; '.join(changed)}; "
        "use the settings it was saved with, or start in a new workdir."
      )
    missing = [number for number in self._lanes if str(number) not in lanes]
    if missing:
      raise UserError(
        f"The saved data position has {len(lanes)} of {self._fingerprint['lanes']} lanes and this host reads lanes "
        f"{missing}, which are not among them: use as many hosts as it was saved by, or restore a whole checkpoint."
      )
    with _readable():
      for number, lane in self._lanes.items():
        lane.restore(lanes[str(number)])

  def tally(self) -> bytes:
    """What was drawn so far by the lanes that are read here, for `accounting.account_metrics`."""
    lanes = {n: {"drawn": list(lane.mixer.drawn), "taken": _taken(lane)} for n, lane in self._lanes.items()}
    facts = {"sources": self._sources, "lanes": lanes, "filled": self._filled, "places": self._places}
    return json.dumps(facts).encode()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
  try:
    yield
  except (ValueError, KeyError, TypeError, zlib.error) as e:  # of another version, or damaged
    raise UserError(f"The saved data position cannot be read ({e}); start afresh or restore another step.") from e


def _taken(lane: Lane) -> list[int]:
  return [stream.taken for stream in lane.mixer.streams]


def train_iterator(
  data: Any, *, seq_len: int, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> TrainIterator:
  """Endless batches of the training documents of `data`.

  Args:
    data: `config.data`, see `settings.DataSettings`.
    seq_len: T, tokens per row.
    batch_size: B, rows of a batch.
    seed: of the order of the documents.
    rows: the rows that this host needs; None for all. Only the lanes that make them are read.

  Raises:
    UserError: as `check_data`.
  """
  data = data_settings(data)
  data = dataclasses.replace(data, lanes=lanes_of(batch_size, data.lanes))
  each = batch_size // data.lanes
  chosen = resolve.training(data)
  check_disjoint(data)
  fingerprint = {
    "data.vocabulary": tokenizer_digest(data.vocabulary),
    "data.eos": data.eos,
    "lanes": data.lanes,
    "seq_len": seq_len,
    "batch_size": batch_size,
    "seed": seed,
  }
  if data.cached:
    fingerprint["data.cached"] = True  # the order of the documents is another
  if any(source.chat for source, _ in chosen):
    fingerprint["encoding of conversations"] = ENCODING
  for source, split in chosen:
    key = "data.train" if len(chosen) == 1 else f"source {source.name}"
    content = source.documents[split].fingerprint() if source.documents else source.task
    fingerprint[key] = content if len(chosen) == 1 else f"{source.weight:.9g} of {content}"
  bos = first_token(load_tokenizer(data.vocabulary), data.bos)
  fingerprint["data.bos"] = "off" if bos is None else "on"
  lanes = {}
  for number in sorted({row // each for row in (range(batch_size) if rows is None else rows)}):
    lanes[number] = Lane(_mixer(chosen, data, seq_len, seed, number, data.lanes), seq_len, bos)
  facts = [_facts(source, split) for source, split in chosen]
  return TrainIterator(lanes, (batch_size, seq_len), each, fingerprint, facts)


def _facts(source: Source, split: str) -> dict[str, Any]:
  documents = source.documents.get(split)
  return {
    "name": source.name,
    "category": source.category,
    "target": source.weight,
    "documents": None if documents is None else len(documents),
    "skipped": 0 if documents is None else documents.skipped,
    "bad": 0 if documents is None else documents.bad,
  }


def _mixer(
  chosen: Sequence[tuple[Source, str]],
  data: DataSettings,
  seq_len: int,
  seed: int,
  lane: int,
  lanes: int,
  epochs: int | None = None,
) -> Mixer:
  tokenizer = load_tokenizer(data.vocabulary)
  encoder = make_encoder(tokenizer, data.eos, seq_len)
  chat = ChatEncoder(tokenizer, encoder) if any(source.chat for source, _ in chosen) else encoder
  streams: list[Stream] = []
  lengths = []
  bytes_per_token = 1 if data.vocabulary == "bytes" else 4  # roughly
  for number, (source, split) in enumerate(chosen):
    documents = source.documents.get(split)
    if documents is None or data.cached:
      # In pieces as those of files, in training: a long document would keep its lane from the other sources.
      size = encoder.size // bytes_per_token if epochs is None else None
      streams.append(_task_stream(source, split, data, seed, lane, lanes, epochs, size))
    else:
      streams.append(FileStream(documents, chat if source.chat else encoder, (seed, number), lane, lanes, epochs))
    length = None if documents is None else min(documents.length.mean(), encoder.size) / bytes_per_token
    lengths.append(length or TASK_TOKENS)
  check = functools.partial(check_ids, tokenizer, data.embedded or np.inf)
  check([tokenizer.bos])  # what every row begins with
  return Mixer(streams, [source.weight for source, _ in chosen], lengths, (seed, lane), check)


def _task_stream(
  source: Source,
  split: str,
  data: DataSettings,
  seed: int,
  lane: int,
  lanes: int,
  epochs: int | None = None,
  size: int | None = None,
) -> TaskStream:
  task = resolve.seqio_task(source, data.vocabulary)
  if data.cached:
    tasks.check_cached(task, data.cached)
  without = None if data.eos else load_tokenizer(data.vocabulary).eos
  return TaskStream(task, split, without, seed, lane, lanes, epochs, bool(data.cached), size)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
  """Batches to evaluate on; a target counts where `loss_mask` is 1.

  Attributes:
    batches: dicts of int32 [B, T] `inputs`, `targets`, `segment_ids`, `positions`, `loss_mask`, all of one shape. They
      are in a temporary file: memory is that of a batch, and of 8 bytes a document.
    document_ids: of each batch int32 [B, T], the document of each target, scored or not, from 0; -1 on padding.
    documents: how many documents they hold, those included that are cut.
    tokens: how many targets: each token of a document once, and its EOS if `eos`; BOS is never a target, and nor is the
      first token of a document that begins without. Of conversations all, though only some are scored.
    split: of the data they are; "all" for a file or folder that is not split.
    complete: whether they are all of the split; if not, the limit of tokens was reached.
    vocabulary: whose ids they are, as `load_tokenizer` takes it.
    eos: whether documents end with an end-of-text token.
    bos: whether they begin with BOS.
    cut: how many of the documents are cut at the limit of tokens: at most one of each source.
    limit: how many tokens were asked for.
    taken: how many documents of each source were read for them.
  """

  batches: Sequence[dict[str, np.ndarray]]
  document_ids: Sequence[np.ndarray]
  documents: int
  tokens: int
  split: str
  complete: bool
  vocabulary: str
  eos: bool
  bos: bool
  cut: int = 0
  limit: int = 0
  taken: Sequence[int] = ()

  @property
  def note(self) -> str:
    """Why they are not whole documents, or fewer tokens than 99 % of what was asked for; "" where neither is so."""
    if self.cut:
      which = "" if self.documents == 1 else f"{self.cut} of the documents "
      return f"{which}cut at the {self.limit:,} tokens asked for"
    return "" if self.tokens >= 0.99 * self.limit else f"all of the text: {self.limit:,} tokens were asked for"

  @property
  def size(self) -> str:
    """How much they are, in words, with the `note`."""
    plural = "s" * (self.documents != 1)
    note = f" ({self.note})" if self.note else ""
    return f"{self.tokens:,} tokens in {self.documents:,} document{plural}{note}"

  @property
  def padding(self) -> float:
    """Share of places without a target."""
    return 1 - self.tokens / sum(batch["targets"].size for batch in self.batches)


class NoText(UserError):
  """There is no document to evaluate on."""


def evaluation_batches(
  data: Any, *, seq_len: int, batch_size: int, max_tokens: int, skip: Sequence[int] = ()
) -> EvaluationSet:
  """The first `max_tokens` of the validation documents of `data`, in a fixed, mixed order.

  The document that does not fit the rest of `max_tokens` is cut to it, of a mixture one of each source at most: the end
  of a cut document is not encoded. Documents longer than T lie in several rows. Sources of a mixture are drawn by their
  weights, until there are no more. The same on every host.

  Args:
    data: `config.data`, see `settings.DataSettings`.
    seq_len: T, tokens per row.
    batch_size: B, rows of a batch.
    max_tokens: how many targets; fewer where the data ends before (`EvaluationSet.note`).
    skip: so many documents of each source are left out first: `EvaluationSet.taken` of the ones evaluated before, so
      that the end of a document that was cut there is not taken either.

  Raises:
    UserError: as `check_data`.
    NoText: there is no document, or all are left out.
  """
  data = data_settings(data)
  check_disjoint(data)
  return _evaluation_set(resolve.validation(data), data, seq_len, batch_size, max_tokens, skip)


def evaluation_by_source(data: Any, *, seq_len: int, batch_size: int, max_tokens: int) -> dict[str, EvaluationSet]:
  """`evaluation_batches` of each source of a mixture by itself, of `max_tokens` together; {} for a single source."""
  data = data_settings(data)
  chosen = resolve.validation(data)
  if len(chosen) == 1:
    return {}
  share = max(1, max_tokens // len(chosen))
  return {source.name: _evaluation_set([(source, s)], data, seq_len, batch_size, share) for source, s in chosen}


def _evaluation_set(
  chosen: list[tuple[Source, str]],
  data: DataSettings,
  seq_len: int,
  batch_size: int,
  max_tokens: int,
  skip: Sequence[int] = (),
) -> EvaluationSet:
  data = dataclasses.replace(data, cached="")  # few are read, and always the same ones
  mixer = _mixer(chosen, data, seq_len, EVALUATION_SEED, 0, 1, epochs=1)
  for stream, number in zip(mixer.streams, skip, strict=False):
    stream.skip(number)
  bos = first_token(load_tokenizer(data.vocabulary), data.bos)
  first = First(mixer, max_tokens, bos)
  packer = Packer(first.documents(lambda: packer.targets), seq_len, bos, split_documents=False)
  batches = spool(_evaluation_batches(packer, batch_size))
  tokens, split = packer.targets, chosen[0][1]
  if not tokens:
    raise NoText(
      f"The validation data {chosen[0][0].name!r} has no text in split {split!r}; set data.validation to another."
    )
  if not any(batch["loss_mask"].any() for batch in batches):
    raise UserError(
      f"The first {tokens} tokens of the validation data {chosen[0][0].name!r} hold nothing an assistant says, so that "
      "there is nothing to score; evaluate on more tokens, config.analysis.tokens, or set data.validation to another."
    )
  ids = batches.arrays[:, -1]
  batches = Spool(batches.keys[:-1], batches.arrays[:, :-1])
  return EvaluationSet(
    batches, ids, packer.documents, tokens, split, first.complete, data.vocabulary, data.eos, bos is not None,
    cut=first.cut, limit=max_tokens, taken=first.taken,
  )  # fmt: skip


def _evaluation_batches(packer: Packer, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the rows, each with `document_ids` last: the document of each target from 0, -1 on padding."""
  rows = _rows(packer)
  while some := list(itertools.islice(rows, batch_size)):
    batch = stack_rows([row for row, _ in some], batch_size)
    ids = np.full(batch["segment_ids"].shape, -1, np.int32)
    ids[: len(some)] = np.stack([ids_of_row for _, ids_of_row in some]) - 1
    yield batch | {"document_ids": ids}


def _rows(packer: Packer) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
  """Each row and the documents of its targets."""
  while True:
    try:
      yield packer.next_row(), packer.document_ids
    except StopIteration:
      return
