"""Held-out documents that are trained on too: the loss on them does not tell how a model does on new text.

Only whole documents of the same text are found, whatever their formats. Not found are copies with other spaces or
cases, parts of documents, and a text that is a document on one side and a conversation on the other; the n-grams of
`experiments/data.py stats --evals=FILE` (`overlap`) show such. The documents of seqio tasks are not indexed, so that
nothing is known of them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tsparse.data.resolve import held_out, training
from tsparse.data.settings import DataSettings
from tsparse.data.sources import Documents
from tsparse.errors import UserError

DEFINITIONS = {
  "leakage": "`shared`: held-out documents, evaluated or not, whose whole text is a document that is trained on too; "
  "`fraction`: of all that are held out in files (`held_out`); `unknown`: seqio tasks, whose documents are not compared"
}
AT_ONCE = 1024  # documents whose texts are in memory
COPIES = 4  # of documents of one crc32 in a source that are looked at: more are copies of each other


@dataclasses.dataclass(frozen=True)
class Leakage:
  """What of the held-out documents is trained on too.

  Attributes:
    held_out: how many documents are held out, those of seqio tasks not counted.
    shared: how many of them are trained on too.
    example: the beginning of one, and the file it is trained on from; "" where there is none.
    unknown: the seqio tasks whose documents cannot be compared.
  """

  held_out: int
  shared: int
  example: str
  unknown: tuple[str, ...]

  @property
  def fraction(self) -> float | None:
    """shared / held_out; None where nothing is known."""
    return self.shared / self.held_out if self.held_out else None

  @property
  def sentence(self) -> str:
    """What the console and the report say."""
    tasks = f"the documents of {', '.join(self.unknown)} cannot be compared" if self.unknown else ""
    if not self.held_out:
      return f"how many held-out documents are trained on is unknown: {tasks}"
    such = f", such as {self.example}" if self.example else ""
    found = f"{self.shared:,} of {self.held_out:,} held-out documents ({self.fraction:.2%}) are trained on too{such}"
    return f"{found}; {tasks}" if tasks else found

  def facts(self) -> dict[str, Any]:
    """The same for JSON."""
    return dataclasses.asdict(self) | {"fraction": self.fraction, "sentence": self.sentence}


def leakage(data: DataSettings, trained_on: DataSettings | None = None) -> Leakage | None:
  """Compares what `data` holds out with what it, or `trained_on`, trains on; None where either is nothing.

  A candidate of the same crc32 is read, so that what is counted are copies.

  Raises:
    UserError: as `resolve.training`, or a document cannot be read.
  """
  trained_on = trained_on or data
  if not (trained_on.train or trained_on.mixture):
    return None
  sides = [held_out(data), training(trained_on)]
  if not sides[0]:
    return None
  held, trained = (tuple(source.documents[split] for source, split in side if source.documents) for side in sides)
  tasks = dict.fromkeys(source.name for side in sides for source, _ in side if not source.documents)
  shared, example = _shared(held, trained)
  return Leakage(sum(map(len, held)), shared, example, tuple(tasks))


def check_disjoint(data: DataSettings, trained_on: DataSettings | None = None) -> Leakage | None:
  """`leakage`; UserError where it is more than `data.allow_overlap`."""
  trained_on = trained_on or data
  found = leakage(data, trained_on)
  if found is None or found.fraction is None or found.fraction <= data.allow_overlap:
    return found
  text, source = data.validation or data.mixture or data.train, trained_on.mixture or trained_on.train
  empty = "leave data.validation empty to hold out one document in 20, " if data.validation else ""
  raise UserError(
    f"{found.shared:,} of {found.held_out:,} held-out documents ({found.fraction:.2%}) of {text} are "
    f"trained on too, with {source}, such as {found.example}; config.data.allow_overlap allows "
    f"{data.allow_overlap:.2%}. Take them out of one of the two, {empty}or raise --config.data.allow_overlap."
  )


@functools.lru_cache(maxsize=16)
def _shared(held: tuple[Documents, ...], trained: tuple[Documents, ...]) -> tuple[int, str]:
  """How many of the held-out documents are among the trained ones, and an example."""
  wanted, known = _distinct([documents.crc for documents in held]), {}  # digest of a text -> its file
  candidates = []
  for documents in trained:
    chosen = _first_copies(documents.crc, _among(documents.crc, wanted))
    candidates.append(documents.crc[chosen])
    for index, text in _texts(documents, chosen):
      file = documents.files[documents.file[index]]
      known.setdefault(_digest(text), file.origin or file.path)
  shared, example, wanted = 0, "", _distinct(candidates)
  for documents in held:
    for _, text in _texts(documents, _among(documents.crc, wanted)):
      file = known.get(_digest(text))
      shared += file is not None
      if file is not None and not example:
        example = f"{text.decode()[:60]!r} in {file}"
  return shared, example


def _distinct(crcs: Sequence[np.ndarray]) -> np.ndarray:
  return np.unique(np.concatenate([np.zeros(0, np.uint32), *crcs]))


def _among(crc: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Where `crc` is one of `wanted`, which are sorted; int64 indices."""
  if not len(wanted):
    return np.zeros(0, np.int64)
  return np.flatnonzero(wanted[np.minimum(np.searchsorted(wanted, crc), len(wanted) - 1)] == crc)


def _first_copies(crc: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """The first COPIES of `chosen` of each crc, in their order."""
  ordered = chosen[np.argsort(crc[chosen], kind="stable")]
  same = crc[ordered[COPIES:]] == crc[ordered[:-COPIES]] if len(ordered) > COPIES else np.zeros(0, bool)
  return np.sort(np.concatenate([ordered[:COPIES], ordered[COPIES:][~same]]))


def _texts(documents: Documents, chosen: Sequence[int]) -> Iterator[tuple[int, bytes]]:
  for start in range(0, len(chosen), AT_ONCE):
    some = chosen[start : start + AT_ONCE]
    yield from zip(some, documents.read_all(some), strict=True)


def _digest(text: bytes) -> bytes:
  return hashlib.blake2b(text, digest_size=16).digest()
