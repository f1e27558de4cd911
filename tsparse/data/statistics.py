"""What the text of each source of a mixture is like, in one pass over what would be trained on.

Documents pass one by one. What is kept of them is 8 bytes each, for the duplicates, beside the index of the files.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tsparse.data import resolve
from tsparse.data.chat import ChatEncoder
from tsparse.data.encoding import load_tokenizer, make_encoder
from tsparse.data.order import round_keys, shuffled
from tsparse.data.overlap import Overlap
from tsparse.data.resolve import Source
from tsparse.data.settings import DataSettings
from tsparse.data.streams import TaskStream

BINS = 48  # of the histogram of lengths: 2^47 tokens are more than a document has
DEFINITIONS = {
  "documents": "documents to train on: the held-out ones are not in any number here; measured are those that were read",
  "bytes": "of the text in UTF-8; of conversations, of what is said in them, without roles and markers; of a seqio "
  "task, which gives tokens only, of their text",
  "tokens": "as drawn in training: an end-of-text token for each document, no beginning-of-text token",
  "lengths": "documents of 2^i to 2^(i+1) - 1 tokens, for i = 0, 1, ...",
  "copies": "documents whose whole text (a 64-bit hash of it) an earlier document of the source has",
  "elsewhere": "documents whose whole text a document of another source has",
  "weight": "share of the tokens that training draws from the source",
  "share": "share of the source in the tokens that all sources hold",
  "epochs": "times the source is read while the budget of tokens is drawn: budget x weight / tokens of the source",
  "skipped": "blank lines and empty texts, held-out ones included; left out",
  "malformed": "lines that are no document; left out, as far as --skip_bad lets them",
  "overlap": "evaluation items (question and right answer) with at least one n-gram of n words in the training text, "
  "over the items that have n words; words are runs of letters and digits in lower case",
}


def statistics(
  data: DataSettings,
  overlap: Overlap,
  max_documents: int | None = None,
  budget: int | None = None,
  progress: Callable[[str, int, Iterator], Iterator] = lambda title, total, items: items,
) -> dict[str, Any]:
  """Reads the training documents of `data` and returns what is written to JSON.

  Args:
    data: which documents and which tokens.
    overlap: the evaluation items that are looked for.
    max_documents: so many of each source are measured, a random choice that is always the same; None for all.
    budget: tokens that a run would draw, for the epochs.
    progress: passes on the documents of a source, given its name and how many they are (0: unknown).

  Raises:
    UserError: as `resolve.training`, or a document cannot be read.
  """
  sources, hashes, found = [], [], {name: np.zeros_like(items) for name, items in overlap.found.items()}
  for source, split in resolve.training(data):
    overlap.forget()
    row, digests = _measured(source, split, data, overlap, max_documents, progress)
    for name, items in overlap.found.items():
      found[name] |= items
    sources.append(row)
    hashes.append(digests)
  for row, elsewhere in zip(sources, _elsewhere(hashes), strict=True):
    row["elsewhere"] = elsewhere
  total = sum(row["tokens_held"] or 0 for row in sources)
  for row in sources:
    held = row["tokens_held"]
    row["share"] = held / total if held else None
    row["epochs"] = budget * row["weight"] / held if budget and held else None
  evaluations = {
    name: {"items": len(items), "short": int(overlap.short[name].sum()), "found": int(items.sum()),
           "share": share(items.sum(), overlap.short[name])}
    for name, items in found.items()
  }  # fmt: skip
  return {
    "data": data.mixture or data.train,
    "vocabulary": data.vocabulary,
    "budget": budget,
    "sources": sources,
    "evaluations": evaluations,
    "definitions": DEFINITIONS,
  }


def share(found: int, short: np.ndarray) -> float | None:
  """Of the items that are long enough, so many were found; None where none is."""
  long_enough = int((~short).sum())
  return int(found) / long_enough if long_enough else None


def _measured(
  source: Source, split: str, data: DataSettings, overlap: Overlap, max_documents: int | None, progress: Callable
) -> tuple[dict[str, Any], np.ndarray]:
  documents = source.documents.get(split)
  held = None if documents is None else len(documents)
  wanted = min(held or max_documents or 0, max_documents or held or 0)
  lengths, digests, size, tokens, longest = np.zeros(BINS, np.int64), array("Q"), 0, 0, 0
  texts = _task_texts(source, split, data, max_documents) if documents is None else _texts(source, split, data, wanted)
  for text, count in progress(source.name, wanted, texts):
    raw = text.encode()
    digests.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
    lengths[count.bit_length() - 1] += count > 0
    size, tokens, longest = size + len(raw), tokens + count, max(longest, count)
    overlap.add(text)
  measured = len(digests)
  if held is None and (max_documents is None or measured < max_documents):
    held = measured  # the task was read to its end
  unique = np.unique(np.array(digests, np.uint64))
  row = {
    "name": source.name,
    "category": source.category,
    "weight": source.weight,
    "split": split,
    "documents": held,
    "measured": measured,
    "bytes": size,
    "tokens": tokens,
    "tokens_held": round(tokens * held / measured) if held and measured else None,
    "bytes_per_token": size / tokens if tokens else None,
    "longest": longest,
    "lengths": np.trim_zeros(lengths, "b").tolist(),
    "copies": measured - len(unique),
    "skipped": 0 if documents is None else documents.skipped,
    "malformed": 0 if documents is None else documents.bad,
    "overlap": {name: int(items.sum()) for name, items in overlap.found.items()},
  }
  return row, np.array(digests, np.uint64)


def _texts(source: Source, split: str, data: DataSettings, wanted: int) -> Iterator[tuple[str, int]]:
  """(text, tokens) of `wanted` documents of files, in the order in which they lie there."""
  documents, tokenizer = source.documents[split], load_tokenizer(data.vocabulary)
  encoder = make_encoder(tokenizer, data.eos, 0)
  encoder = ChatEncoder(tokenizer, encoder) if source.chat else encoder
  chosen = range(wanted)
  if wanted < len(documents):
    chosen = np.sort(shuffled(np.arange(wanted), len(documents), round_keys(0))).tolist()
  for number in chosen:
    text = documents.read(number).decode()
    opened, place, tokens = encoder.open(text), 0, 0
    while place < len(opened):
      piece, _, place = encoder.piece(opened, place)
      tokens += len(piece)
    yield "\n".join(said for _, said in json.loads(text)) if source.chat else text, tokens


def _task_texts(source: Source, split: str, data: DataSettings, wanted: int | None) -> Iterator[tuple[str, int]]:
  """The same of a seqio task, in its order."""
  tokenizer = load_tokenizer(data.vocabulary)
  stream = TaskStream(resolve.seqio_task(source, data.vocabulary), split, tokenizer.eos, 0, 0, 1, epochs=1)
  while (wanted is None or stream.taken < wanted) and (piece := stream.next_piece()) is not None:
    yield tokenizer.decode(piece.tokens.tolist()), len(piece.tokens) + data.eos


def _elsewhere(hashes: Sequence[np.ndarray]) -> list[int]:
  """Of each source, how many of its documents another source has too."""
  unique = [np.unique(each) for each in hashes]
  values, counts = np.unique(np.concatenate(unique), return_counts=True)
  several = values[counts > 1]
  return [int(np.isin(each, several).sum()) for each in hashes]
