"""Evaluation items whose words stand in training text: overlap of n-grams, as GPT-3 (arXiv 2005.14165, C) counted it.

An item is its question and its right answer, or its text; its words are the runs of letters and digits, in lower case.
Only the n-grams of the evaluation side are kept, so that training text of any length passes in little memory.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tsparse.errors import UserError

WORD = re.compile(r"[^\W_]+")
WANTED = 'an item is {"query": ..., "choices": [...], "gold": NUMBER} or {"text": ...}'
BASE = np.uint64(0x9E3779B97F4A7C15)  # of a polynomial modulo 2^64, odd


def words_of(text: str) -> list[str]:
  """Its runs of letters and digits, in lower case."""
  return WORD.findall(text.lower())


def read_evaluations(paths: Sequence[str]) -> dict[str, list[str]]:
  """{name of the file: text of its items} of .jsonl files, and of all such files in folders.

  Raises:
    UserError: there is none, one cannot be read, or a line is no item.
  """
  files = []
  for path in map(Path, paths):
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not found or not all(file.is_file() and file.suffix == ".jsonl" for file in found):
      raise UserError(f"--evals={path} is no .jsonl file and no folder that holds one: name files of evaluation items.")
    files += found
  names = [file.stem for file in files]
  if len(set(names)) < len(names):
    raise UserError(f"--evals names {', '.join(sorted({n for n in names if names.count(n) > 1}))} twice: name it once.")
  return {file.stem: [_item(line, f"{file}:{i}") for i, line in _lines(file) if line.strip()] for file in files}


def _lines(file: Path):
  try:
    return list(enumerate(file.read_text(encoding="utf-8").split("\n"), start=1))
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f"--evals={file} cannot be read ({e}): name a readable .jsonl file in UTF-8.") from e


def _item(line: str, place: str) -> str:
  try:
    item = json.loads(line)
    text = item["text"] if "text" in item else f"{item['query']}\n{item['choices'][item['gold']]}"
  except (ValueError, KeyError, TypeError, IndexError) as e:
    raise UserError(f"{place} is no evaluation item ({e!r}): {WANTED}.") from e
  if not isinstance(text, str):
    raise UserError(f"{place} has a {type(text).__name__} where its text belongs: {WANTED}.")
  return text


class Overlap:
  """Which items have an n-gram in common with the text that `add` was given.

  Attributes:
    short: {evaluation set: bool [items]}, whether the item has fewer than n words and so can overlap with nothing.
    found: {evaluation set: bool [items]}, whether one of its n-grams was seen.
  """

  def __init__(self, evaluations: dict[str, list[str]], n: int):
    self._n = n
    self._numbers: dict[str, int] = {}  # of the words of all items, from 1: 0 is any other word
    self._items: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    self.short = {name: np.zeros(len(texts), bool) for name, texts in evaluations.items()}
    self.found = {name: np.zeros(len(texts), bool) for name, texts in evaluations.items()}
    hashes = [np.zeros(0, np.uint64)]
    for name, texts in evaluations.items():
      for number, words in enumerate(map(words_of, texts)):
        self.short[name][number] = len(words) < n
        for word in words:
          self._numbers.setdefault(word, len(self._numbers) + 1)
        hashes.append(self._hashes(words))
        for gram in zip(*(words[i:] for i in range(n)), strict=False):
          self._items[gram].append((name, number))
    self._known = np.unique(np.concatenate(hashes))

  def forget(self):
    """Begins anew: nothing was seen."""
    for found in self.found.values():
      found[:] = False

  def add(self, text: str):
    """Looks for every n-gram of `text` by its hash, and for those that hit by their words."""
    words = words_of(text)
    hashes = self._hashes(words)
    if not len(hashes) or not len(self._known):
      return
    nearest = self._known[np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)]
    for place in np.flatnonzero(nearest == hashes).tolist():
      for name, number in self._items.get(tuple(words[place : place + self._n]), ()):
        self.found[name][number] = True

  def _hashes(self, words: list[str]) -> np.ndarray:
    """uint64 of each n-gram: sum_i BASE^(n - 1 - i) w_i modulo 2^64, w_i the number of its word i."""
    numbers = np.array([self._numbers.get(word, 0) for word in words], np.uint64)
    count = max(0, len(numbers) - self._n + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(self._n):
      hashes = hashes * BASE + numbers[i : i + count]
    return hashes
