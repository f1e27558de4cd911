"""What training and evaluation see of the data: int32 [B, T] numpy arrays, and a position that can be saved."""

import contextlib
import dataclasses
import io
import itertools
import json
import weakref
import zipfile
from collections.abc import Iterator

import numpy as np

from tsparse.data import tasks
from tsparse.data.packing import Packer, stack_rows
from tsparse.data.tensorflow import load_tensorflow, silent_stderr
from tsparse.data.vocabulary import bos_id, load_vocabulary, vocabulary_digest
from tsparse.errors import UserError

EVALUATION_SEED = 0  # one fixed order for ever: losses of different runs are on the same documents


def check_data(data, model_vocab_size: int):
  """Finds all that can be wrong with the settings of the data before anything is trained.

  Args:
    data: has `train`, `validation`, `vocabulary` and `eos` (`config.data`).
    model_vocab_size: rows of the model's embedding.

  Raises:
    UserError: unknown D, unreadable or malformed file, no validation documents, the same documents on both sides, a
      vocabulary that cannot be loaded or is larger than the model's.
  """
  size = load_vocabulary(data.vocabulary).vocab_size
  if size > model_vocab_size:
    raise UserError(
      f"The vocabulary {data.vocabulary!r} has {size} ids and the model embeds {model_vocab_size}; "
      f"set config.model's vocabulary size to at least {size} or name the model's own vocabulary."
    )
  for name, split in (_training(data), _validation(data)):
    tasks.check_split(name, split)
    tasks.provider(name, data.vocabulary)
  _check_disjoint(data)


class TrainIterator:
  """Endless training batches, dicts of int32 [B / num_hosts, T]: `inputs`, `targets`, `segment_ids`, `positions`.

  Rows are full: see `tsparse.data.packing`. Documents are reshuffled each epoch by the seed.
  """

  def __init__(self, documents: "_Documents", packer: Packer, rows: int, fingerprint: dict):
    self._documents = documents
    self._packer = packer
    self._rows = rows
    self._fingerprint = fingerprint

  def __iter__(self) -> "TrainIterator":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    try:
      return stack_rows([self._packer.next_row() for _ in range(self._rows)], self._rows)
    except StopIteration:
      raise UserError(
        f"The training data {self._fingerprint['data.train']!r} gave no more documents; "
        "its shard of this host is empty: use fewer hosts or more documents."
      ) from None

  def state(self) -> bytes:
    """The position of this host: `restore` of it continues bit for bit, in any process."""
    buffer = io.BytesIO()
    np.savez_compressed(
      buffer,
      fingerprint=np.frombuffer(json.dumps(self._fingerprint).encode(), np.uint8),
      packer=self._packer.state(),
      documents=np.frombuffer(self._documents.state(), np.uint8),
    )
    return buffer.getvalue()

  def restore(self, state: bytes):
    """Continues from `state()` of an iterator made with the same arguments.

    Raises:
      UserError: the state is not one, or belongs to other data or settings.
    """
    try:
      with np.load(io.BytesIO(state)) as saved:
        fingerprint = json.loads(saved["fingerprint"].tobytes())
        packer, documents = saved["packer"], saved["documents"].tobytes()
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as e:
      raise UserError(f"The saved data position cannot be read ({e}); start afresh or restore another step.") from e
    changed = [
      f"{key} was {fingerprint.get(key)} and is {value}"
      for key, value in self._fingerprint.items()
      if fingerprint.get(key) != value
    ]
    if changed:
      raise UserError(
        f"The saved data position belongs to another run: {'; '.join(changed)}; "
        "use the settings it was saved with, or start in a new workdir."
      )
    self._documents.restore(documents)
    self._packer.restore(packer)


def train_iterator(
  data, *, seq_len: int, batch_size: int, seed: int, host: int = 0, num_hosts: int = 1
) -> TrainIterator:
  """Endless batches of the training documents of `data`.

  Args:
    data: has `train`, `validation`, `vocabulary` and `eos` (`config.data`).
    seq_len: T, tokens per row.
    batch_size: B, rows of a batch of all hosts together.
    seed: of the order of the documents.
    host: which shard of the documents to give, of `num_hosts`.
    num_hosts: how many shards there are; in each epoch they are disjoint and together complete.

  Raises:
    UserError: as `check_data`, or B does not divide by the hosts.
  """
  if batch_size % num_hosts:
    raise UserError(
      f"A batch of {batch_size} rows does not divide by {num_hosts} hosts; use a multiple of {num_hosts}."
    )
  name, split = _training(data)
  tasks.check_split(name, split)
  _check_disjoint(data)
  own = tasks.own_documents(name)
  fingerprint = {
    "data.train": name if own is None else ", ".join(splits[split].fingerprint() for splits in own.values()),
    "data.vocabulary": vocabulary_digest(data.vocabulary),
    "data.eos": data.eos,
    "seq_len": seq_len,
    "batch_size": batch_size,
    "seed": seed,
    "host": f"{host} of {num_hosts}",
  }
  documents = _Documents(name, split, data, seed=seed, epochs=None, host=host, num_hosts=num_hosts)
  packer = Packer(documents, seq_len, bos_id(load_vocabulary(data.vocabulary)), split_documents=True)
  return TrainIterator(documents, packer, batch_size // num_hosts, fingerprint)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
  """Batches to evaluate on; a target counts where `segment_ids` > 0.

  Attributes:
    batches: dicts of int32 [B, T] `inputs`, `targets`, `segment_ids`, `positions`, all of one shape.
    document_ids: of each batch int32 [B, T], the document each target belongs to, from 0; -1 where there is none.
    documents: how many documents they hold.
    tokens: how many targets: each token of a document once, and its EOS if `eos`; BOS is never a target.
    split: of the data they are; "all" for a file or folder that is not split.
    complete: whether they are all of the split; if not, the limit of tokens was reached.
    vocabulary: whose ids they are, as `load_vocabulary` takes it.
    eos: whether documents end with an end-of-text token.
  """

  batches: list[dict[str, np.ndarray]]
  document_ids: list[np.ndarray]
  documents: int
  tokens: int
  split: str
  complete: bool
  vocabulary: str
  eos: bool

  @property
  def padding(self) -> float:
    """Share of places without a target."""
    return 1 - self.tokens / sum(batch["targets"].size for batch in self.batches)


def evaluation_batches(data, *, seq_len: int, batch_size: int, max_tokens: int, skip: int = 0) -> EvaluationSet:
  """The validation documents of `data` in a fixed, mixed order: as many whole ones as `max_tokens` hold.

  If not even the first does, it is cut there. Documents longer than T are cut into pieces of T. The same on every host.
  The first `skip` documents are left out.

  Raises:
    UserError: as `check_data`, or all are left out.
  """
  name, split = _validation(data)
  tasks.check_split(name, split)
  _check_disjoint(data)
  chosen, tokens, complete = [], 0, True
  documents = _Documents(name, split, data, seed=EVALUATION_SEED, epochs=1)
  for document in itertools.islice(documents, skip, None):
    complete = tokens + len(document) <= max_tokens
    if not complete and chosen:
      break
    chosen.append(document[:max_tokens])
    tokens += len(chosen[-1])
    if not complete:
      break
  if not tokens:
    raise UserError(f"The validation data {name!r} has no text in split {split!r}; set data.validation to another.")
  packer = Packer(iter(chosen), seq_len, bos_id(load_vocabulary(data.vocabulary)), split_documents=False)
  rows = list(_rows(packer))
  batches = [stack_rows(rows[i : i + batch_size], batch_size) for i in range(0, len(rows), batch_size)]
  ids = document_ids(batches, [len(document) for document in chosen])
  return EvaluationSet(batches, ids, len(chosen), tokens, split, complete, data.vocabulary, data.eos)


def document_ids(batches: list[dict[str, np.ndarray]], lengths: list[int]) -> list[np.ndarray]:
  """Of each batch int32 [B, T], the document of each target and -1 elsewhere: packing keeps the documents' order."""
  left = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
  result = []
  for batch in batches:
    ids = np.full(batch["segment_ids"].shape, -1, np.int32)
    real = batch["segment_ids"] > 0
    ids[real], left = left[: real.sum()], left[real.sum() :]
    result.append(ids)
  return result


def _rows(packer: Packer) -> Iterator[dict[str, np.ndarray]]:
  while True:
    try:
      yield packer.next_row()
    except StopIteration:
      return


class _Documents:
  """Iterates over the tokens, int32 [n], of the documents of a split; the last is EOS if `data.eos`."""

  def __init__(self, name, split, data, *, seed, epochs, host=0, num_hosts=1):
    seqio, tf = load_tensorflow()
    dataset = tasks.provider(name, data.vocabulary).get_dataset(
      sequence_length=None,  # nothing is trimmed
      split=split,
      shuffle=True,
      seed=seed,
      shard_info=seqio.ShardInfo(host, num_hosts),
      num_epochs=epochs,
      try_in_mem_cache=False,  # the cache would be in every saved state, and would freeze the order of the first epoch
    )
    options = tf.data.Options()
    options.deterministic = True
    # A list, so that it can be emptied at exit, before the interpreter is torn down: tf.data's threads may then be
    # waiting to call our Python reader, and the iterator's destructor would wait for them for ever.
    self._iterator = [dataset.with_options(options).as_numpy_iterator()]
    weakref.finalize(self, self._iterator.clear)
    self._started = False
    self._without = None if data.eos else load_vocabulary(data.vocabulary).eos_id

  def __iter__(self):
    return self

  def __next__(self) -> np.ndarray:
    # SentencePiece's TensorFlow kernel writes a notice when it first runs, and cannot be told not to.
    with contextlib.nullcontext() if self._started else silent_stderr():
      self._started = True
      while True:
        document = next(self._iterator[0])["targets"]
        if self._without is None:
          return document
        if len(document) and document[-1] == self._without:
          document = document[:-1]
        if len(document):
          return document

  def state(self) -> bytes:
    state = self._iterator[0].save()
    return state.numpy() if hasattr(state, "numpy") else state

  def restore(self, state: bytes):
    with silent_stderr():  # the kernels may run from here on
      self._iterator[0].restore(state)


def _training(data) -> tuple[str, str]:
  """(D, split) to train on: all of a file or folder where validation has its own."""
  own = tasks.own_documents(data.train)
  return data.train, "all" if own is not None and data.validation and "files" in own else "train"


def _validation(data) -> tuple[str, str]:
  own = tasks.own_documents(data.validation) if data.validation else None
  return data.validation or data.train, "all" if own is not None and "files" in own else "validation"


def _check_disjoint(data):
  train, validation = (tasks.own_documents(name) or {} if name else {} for name in (data.train, data.validation))
  files = "files" in train and "files" in validation
  if files and np.isin(validation["files"]["all"].crc, train["files"]["all"].crc).all():
    raise UserError(
      f"Every document of data.validation {data.validation} is in data.train too; name other files, "
      "or leave data.validation empty to hold out one document in 20."
    )
