"""Documents in files: an index of byte offsets made in one validating pass, then random access by number.

A folder is all files under it that are of a known format (`formats`). `.jsonl` and `.txt` files are read where they
lie, so only the index (24 bytes a document) is in memory, and the position in the data is a number. Compressed and
columnar files, files in a bucket and datasets of TFDS have no cheap access by number: the validating pass writes their
texts, end to end, into one file of the cache folder, and says so. That costs their unpacked size on disk, once, and
keeps one way of reading, one order and one position for all formats. The index of a large file is kept there too. Both
belong to the file's size and modification time: a file that changes is read anew at the next start, and is an error
while it is read.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from tsparse.data import formats
from tsparse.data.cache import cache_folder, new_file
from tsparse.data.chat import Chat
from tsparse.data.settings import DataSettings
from tsparse.errors import UserError

VALIDATION_SHARE = 20  # one document in so many is held out, chosen by its text: copies of a document stay on one side
VERSION = 2  # of what is kept in the cache; 1 took a .zst that was cut off for a whole one
TEXTS, INDEX = ".texts", ".index.npz"  # of a file, in the cache
KEPT_BYTES = 64 * 2**20  # of a file whose index is kept in the cache: it takes about a second to make
ARRAYS = ("file", "offset", "length", "crc")
# What NumPy and its archive make of an index that is damaged.
UNREADABLE = (ValueError, KeyError, EOFError, TypeError, IndexError, NotImplementedError, RuntimeError, SyntaxError)
UNREADABLE += (zipfile.BadZipFile, zlib.error, struct.error)


@dataclasses.dataclass(frozen=True)
class File:
  """A file as it is read.

  Attributes:
    path: where; of an unpacked file, its copy in the cache.
    state: size and modification time in ns that it must have.
    field: of each JSON line that holds the text, or how its conversation is read; "" where the bytes are the text.
    origin: of an unpacked file, the one it was unpacked from.
  """

  path: str
  state: tuple[int, int]
  field: str | Chat
  origin: str = dataclasses.field(default="", repr=False)  # names of cached tasks are made of the others


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
  """An index of the documents of `files`; `n = len(self)`.

  Attributes:
    files: the files.
    file: int32 [n], which of `files` holds the document.
    offset: int64 [n], where its bytes begin.
    length: int64 [n], how many bytes it takes there (of JSON for a `.jsonl` file).
    crc: uint32 [n], crc32 of its text in UTF-8.
    skipped: how many blank lines and lines with an empty text were left out.
    bad: how many malformed lines were left out (`skip_bad`).
  """

  files: tuple[File, ...]
  file: np.ndarray
  offset: np.ndarray
  length: np.ndarray
  crc: np.ndarray
  skipped: int
  bad: int = 0

  def __len__(self) -> int:
    return len(self.file)

  def read(self, index: int) -> bytes:
    """The text of document `index` in UTF-8; see `read_all`."""
    return self.read_all([index])[0]

  def read_all(self, indices: Sequence[int]) -> list[bytes]:
    """The texts of the documents `indices` in UTF-8; each of their files is opened once.

    Raises:
      UserError: a file is gone or was changed since it was indexed, or a text is not the one that was.
    """
    texts = [b""] * len(indices)
    numbers = self.file[indices]
    for number in dict.fromkeys(numbers.tolist()):
      file = self.files[number]
      try:
        with open(file.path, "rb") as f:
          state = _state(os.fstat(f.fileno()))
          if state != file.state:
            raise UserError(
              f"{file.path} changed while it was being read: it had {file.state[0]} bytes and has {state[0]}, or was "
              "written again; start again, and leave the data alone meanwhile."
            )
          for place in np.flatnonzero(numbers == number).tolist():
            f.seek(self.offset[indices[place]])
            data = f.read(self.length[indices[place]])
            texts[place] = self._checked(file, indices[place], data)
      except OSError as e:
        raise UserError(f"Cannot read {file.path} any more: {e.strerror}; put it back and start again.") from e
    return texts

  def _checked(self, file: File, index: int, data: bytes) -> bytes:
    """The text in the bytes of a document, which must be the one that was indexed."""
    try:
      text = formats.document_of(data, file.field) if file.field else data
      if zlib.crc32(text) == self.crc[index]:
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # JSON no more, or another
      pass
    place = f"the text at byte {self.offset[index]} of {file.path} is not the one that was indexed"
    if not file.origin:
      raise UserError(
        f"{place}, and the file has the size and time it had: put the right one back (or touch it, if it is right) and "
        "start again."
      )
    for path in (file.path, file.path.removesuffix(TEXTS) + INDEX):
      with contextlib.suppress(OSError):
        os.unlink(path)
    raise UserError(
      f"{place}: this copy of {file.origin} in the cache was damaged and is taken away; it is made again when you "
      "start again."
    )

  def where(self, chosen: np.ndarray) -> "Documents":
    """The documents where `chosen`, bool [n], is true."""
    return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in ARRAYS})

  def fingerprint(self) -> str:
    """Tells one collection of texts from another, wherever its files lie."""
    return f"{len(self)} documents of crc32 {zlib.crc32(self.crc.tobytes()):08x}"


@functools.lru_cache(maxsize=64)  # the splits are copies, and asked for again and again
def held_out_splits(documents: Documents) -> dict[str, Documents]:
  """Splits `train` and `validation` by the text of each document, beside `all`; only `all` where one would be empty."""
  held_out = documents.crc % VALIDATION_SHARE == 0
  splits = {"all": documents}
  if held_out.any() and not held_out.all():
    splits |= {"train": documents.where(~held_out), "validation": documents.where(held_out)}
  return splits


def read_documents(path: str, field: str | Chat = "text", skip_bad: int = 0, cache: str = "") -> Documents:
  """Indexes a file or a folder of them, here or in a bucket; every document is read and checked once.

  Args:
    path: of the file or folder.
    field: see `formats.read_items`.
    skip_bad: so many malformed lines are left out and counted, over all files.
    cache: see `cache.cache_folder`.

  Raises:
    UserError: naming the file (and line) that is missing, unreadable, empty or malformed.
  """
  if not formats.is_remote(path):
    path = os.path.abspath(os.path.expanduser(path))
  try:
    folder = not path.startswith(formats.TFDS) and formats.path_of(path).is_dir()
    files = _files_under(path) if folder else [path]
    states = [_stat(file) for file in files]
  except OSError as e:
    name = e.filename or path
    raise UserError(f"Cannot read {name}: {e.strerror or e}; name a readable {formats.LISTED} file or folder.") from e
  except ImportError as e:
    raise UserError(f"Cannot read the bucket of {path} ({e}): install what that names, or copy the data here.") from e
  # A file rewritten by the same process (a notebook) has another key, so the index is never stale.
  return _documents(tuple(files), tuple(states), field, skip_bad, cache)


def documents_of(path: str, data: DataSettings, field: str | Chat = "") -> Documents:
  """`read_documents` as `config.data` says."""
  return read_documents(path, field or data.text_field, data.skip_bad, data.cache)


def _stat(file: str) -> tuple[int, int]:
  if file.startswith(formats.TFDS):
    return _state(os.stat(formats.tfds_folder(file) / "dataset_info.json"))
  if not formats.is_remote(file):
    return _state(os.stat(file))
  stat = formats.path_of(file).stat()
  return stat.length, int(stat.mtime * 1e9)


def _state(stat: os.stat_result) -> tuple[int, int]:
  return stat.st_size, stat.st_mtime_ns


def _files_under(folder: str) -> list[str]:
  if formats.is_remote(folder):
    found = [str(path) for path in formats.path_of(folder).glob("**/*")]
  else:

    def fail(e: OSError):
      raise UserError(f"Cannot read the folder {e.filename}: {e.strerror}; make it readable or name another.") from e

    walk = os.walk(folder, onerror=fail)
    found = [os.path.join(parent, name) for parent, _, names in walk for name in names]
  found = sorted(path for path in found if path.endswith(formats.SUFFIXES))
  if not found:
    raise UserError(f"The folder {folder} holds no {formats.LISTED} file; name a folder that does.")
  return found


@functools.lru_cache(maxsize=64)
def _documents(files: tuple, states: tuple, field: str | Chat, skip_bad: int, cache: str) -> Documents:
  found, parts, skipped, bad = [], [], 0, []
  for path, state in zip(files, states, strict=True):
    file, index = _indexed(path, state, field, skip_bad, skip_bad - len(bad), cache)
    bad += index["bad"].tolist()
    if len(bad) > skip_bad:  # in an index that was made when more were tolerated
      raise _refusal(bad[skip_bad], skip_bad)
    if not len(index["offset"]):
      raise UserError(f"{path} holds no text; remove it or name a file with at least one document.")
    found.append(file)
    parts.append(index)
    skipped += int(index["skipped"])
  file = np.repeat(np.arange(len(found), dtype=np.int32), [len(part["offset"]) for part in parts])
  joined = {name: np.concatenate([part[name] for part in parts]) for name in ("offset", "length", "crc")}
  if skipped or bad:
    what = f"{skipped} blank lines or empty documents" + (f" and {len(bad)} malformed lines" if bad else "")
    logging.warning("Skipped %s of %d in %s", what, skipped + len(bad) + len(file), files[0])
  return Documents(tuple(found), file, **joined, skipped=skipped, bad=len(bad))


def _indexed(
  path: str, state: tuple, field: str | Chat, skip_bad: int, left: int, cache: str
) -> tuple[File, dict[str, np.ndarray]]:
  """A file as it will be read, and the index of its documents, from the cache where they are there.

  Of the `skip_bad` malformed lines that are tolerated, `left` may be in this file.
  """
  unpack = formats.is_remote(path) or path.endswith(formats.PACKED)
  in_place = File(path, state, field if path.endswith(".jsonl") else "")
  if not unpack and state[0] < KEPT_BYTES:
    return in_place, _scan(path, field, skip_bad, left)
  digest = hashlib.blake2b(f"{path} {state} {field} {VERSION}".encode(), digest_size=8).hexdigest()
  stem = cache_folder(cache) / f"{os.path.basename(path)}.{digest}"
  texts, kept = Path(f"{stem}{TEXTS}"), Path(f"{stem}{INDEX}")
  index = _kept(kept, texts if unpack else None, state)
  if index is None:
    if unpack:
      with new_file(texts) as out:
        index = _scan(path, field, skip_bad, left, out)
        size = out.tell()
      logging.warning("Unpacked %s into %s (%.1f MB)", path, texts, size / 1e6)
    else:
      index = _scan(path, field, skip_bad, left)
    with new_file(kept) as out:
      np.savez(out, **index)
  return File(str(texts), _state(texts.stat()), "", path) if unpack else in_place, index


def _kept(kept: Path, texts: Path | None, state: tuple) -> dict[str, np.ndarray] | None:
  """The index in the cache; None where it, or the `texts` it is of, is not there or damaged, which is said.

  Whether the texts are those that were unpacked is seen when each is read.
  """
  if not kept.exists() or (texts and not texts.exists()):
    return None
  try:
    with np.load(kept) as saved:  # an archive, with a checksum of each array
      index = {name: saved[name] for name in ("offset", "length", "crc", "skipped", "bad")}
    size = texts.stat().st_size if texts else state[0]
    ends = index["offset"] + index["length"]
    if len(index["crc"]) != len(ends) or (ends > size).any() or (texts and size != ends.max(initial=0)):
      raise ValueError(f"it is not of a file of {size:,} bytes")
    return index
  except OSError as error:
    raise UserError(f"Cannot read {kept}: {error.strerror or error}; make it readable, or take it away.") from error
  except UNREADABLE as error:
    logging.warning("%s is damaged or not of its texts (%s): it is made again", kept, error)
    return None


def _refusal(sentence: str, skip_bad: int) -> UserError:
  known = f" {skip_bad} malformed lines before it were left out, as config.data.skip_bad says." if skip_bad else ""
  return UserError(sentence + known)


def _scan(path: str, field: str | Chat, skip_bad: int, left: int, out=None) -> dict[str, np.ndarray]:
  """The validating pass; with `out`, a file, the texts are written there and the offsets are those in it."""
  offset, length, crc = array.array("q"), array.array("q"), array.array("I")
  skipped, bad = 0, []
  try:
    for item in formats.read_items(path, field):
      if isinstance(item.text, UserError):
        bad.append(str(item.text))
        if len(bad) > left:
          raise _refusal(bad[-1], skip_bad)
      elif not item.text or item.text.isspace():
        skipped += 1
      else:
        offset.append(item.offset if out is None else out.tell())
        length.append(item.length if out is None else len(item.text))
        crc.append(zlib.crc32(item.text))
        if out is not None:
          out.write(item.text)
  except OSError as e:
    raise UserError(f"Cannot read {path}: {e.strerror or e}; make it readable or name another file.") from e
  found = {"offset": np.array(offset), "length": np.array(length), "crc": np.array(crc, np.uint32)}
  return found | {"skipped": np.array(skipped), "bad": np.array(bad)}
