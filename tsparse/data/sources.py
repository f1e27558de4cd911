"""Documents in files: an index of byte offsets made in one validating pass, then random access by number.

A `.jsonl` file holds one document per line in the field `text`, a `.txt` file is one document, a folder is all such
files under it. Only the index is in memory, so a file may be far larger than memory.
"""

import array
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterator

import numpy as np
from absl import logging

from tsparse.errors import UserError

SUFFIXES = (".jsonl", ".txt")
VALIDATION_SHARE = 20  # one document in so many is held out, chosen by its text: copies of a document stay on one side


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
  """An index of the documents of `files`; `n = len(self)`.

  Attributes:
    files: paths of the files.
    file: int32 [n], which of `files` holds the document.
    offset: int64 [n], where its bytes begin.
    length: int64 [n], how many bytes it takes there (of JSON for a `.jsonl` file).
    crc: uint32 [n], crc32 of its text in UTF-8.
    skipped: how many blank lines and lines with an empty text were left out.
  """

  files: tuple[str, ...]
  file: np.ndarray
  offset: np.ndarray
  length: np.ndarray
  crc: np.ndarray
  skipped: int

  def __len__(self) -> int:
    return len(self.file)

  def read(self, index: int) -> bytes:
    """The text of document `index` in UTF-8."""
    path = self.files[self.file[index]]
    with open(path, "rb") as f:
      f.seek(self.offset[index])
      data = f.read(self.length[index])
    return json.loads(data)["text"].encode() if path.endswith(".jsonl") else data

  def where(self, chosen: np.ndarray) -> "Documents":
    """The documents where `chosen`, bool [n], is true."""
    arrays = {name: getattr(self, name)[chosen] for name in ("file", "offset", "length", "crc")}
    return dataclasses.replace(self, **arrays)

  def fingerprint(self) -> str:
    """Tells one collection of texts from another, wherever its files lie."""
    return f"{len(self)} documents of crc32 {zlib.crc32(self.crc.tobytes()):08x}"


def held_out_splits(documents: Documents) -> dict[str, Documents]:
  """Splits `train` and `validation` by the text of each document, beside `all`; only `all` where one would be empty."""
  held_out = documents.crc % VALIDATION_SHARE == 0
  splits = {"all": documents}
  if held_out.any() and not held_out.all():
    splits |= {"train": documents.where(~held_out), "validation": documents.where(held_out)}
  return splits


def read_documents(path: str) -> Documents:
  """Indexes a `.jsonl` or `.txt` file or a folder of them; every document is read and checked once.

  Raises:
    UserError: naming the file (and line) that is missing, unreadable, empty or malformed.
  """
  path = os.path.abspath(os.path.expanduser(path))
  files = _files_under(path) if os.path.isdir(path) else [path]
  try:
    stats = [os.stat(file) for file in files]
  except OSError as e:
    raise UserError(f"Cannot read {e.filename}: {e.strerror}; name a readable .jsonl or .txt file or folder.") from e
  # A file rewritten by the same process (a notebook) has another key, so the index is never stale.
  return _index(tuple(files), tuple((s.st_size, s.st_mtime_ns) for s in stats))


def _files_under(folder: str) -> list[str]:
  def fail(e: OSError):
    raise UserError(f"Cannot read the folder {e.filename}: {e.strerror}; make it readable or name another.") from e

  found = sorted(
    os.path.join(parent, name)
    for parent, _, names in os.walk(folder, onerror=fail)
    for name in names
    if name.endswith(SUFFIXES)
  )
  if not found:
    raise UserError(f"The folder {folder} holds no .jsonl or .txt file; name a folder that does.")
  return found


@functools.lru_cache(maxsize=32)
def _index(files: tuple[str, ...], _stats: tuple) -> Documents:
  file, offset, length, crc = array.array("i"), array.array("q"), array.array("q"), array.array("I")
  skipped = 0
  for number, path in enumerate(files):
    found = 0
    try:
      for start, size, text in _documents_of(path):
        if not text or text.isspace():
          skipped += 1
          continue
        found += 1
        file.append(number)
        offset.append(start)
        length.append(size)
        crc.append(zlib.crc32(text))
    except OSError as e:
      raise UserError(f"Cannot read {path}: {e.strerror}; make it readable or name another file.") from e
    if not found:
      raise UserError(f"{path} holds no text; remove it or name a file with at least one document.")
  documents = Documents(files, np.array(file), np.array(offset), np.array(length), np.array(crc, np.uint32), skipped)
  if skipped:
    logging.warning("Skipped %d blank lines or empty documents of %d in %s", skipped, skipped + len(file), files[0])
  return documents


def _documents_of(path: str) -> Iterator[tuple[int, int, bytes]]:
  """Yields (offset, length, text) of every document, and an empty text for a blank line."""
  if not path.endswith(SUFFIXES):
    raise UserError(f"Cannot read documents from {path}: it must end in .jsonl or .txt (or be a folder of such files).")
  with open(path, "rb") as f:
    if path.endswith(".txt"):
      data = f.read()
      _decode(data, path)
      yield 0, len(data), data
      return
    offset = 0
    for number, line in enumerate(f, start=1):
      text = _text_of_line(line, f"{path}:{number}") if line.strip() else b""
      yield offset, len(line), text
      offset += len(line)


def _decode(data: bytes, place: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise UserError(f"{place} is not UTF-8 at byte {e.start}; convert it to UTF-8.") from e


def _text_of_line(line: bytes, place: str) -> bytes:
  wanted = 'each line must be a JSON object with a string field "text"'
  try:
    record = json.loads(_decode(line, place))
  except (ValueError, RecursionError) as e:  # also a number too long, or brackets too deep, to be read
    raise UserError(f"{place} is not JSON ({e}); {wanted}.") from e
  if not isinstance(record, dict) or "text" not in record:
    found = f"fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
    raise UserError(f'{place} has no field "text" ({found}); {wanted}.')
  if not isinstance(record["text"], str):
    raise UserError(f'The field "text" of {place} is a {type(record["text"]).__name__}; {wanted}.')
  try:
    return record["text"].encode()
  except UnicodeEncodeError as e:
    raise UserError(f'The field "text" of {place} is not valid Unicode (a lone surrogate); {wanted}.') from e
