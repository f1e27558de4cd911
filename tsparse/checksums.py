"""Checksums of files, by which damage is noticed that their formats let pass: XXH3-128, as `xxhsum -H128` prints it.

FOLDER/checksums.json   {"xxh3_128": {NAME: [BYTES, HEXADECIMAL], ...}}, names relative to FOLDER

A folder without it is from elsewhere, or older than this: there is nothing to compare it with.
"""

import functools
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from tsparse import files

NAME, KIND = "checksums.json", "xxh3_128"
BLOCK = 4 * 2**20  # bytes that a thread holds
THREADS = min(8, os.cpu_count() or 1)  # xxhash and read() leave Python's lock alone

Checksum = tuple[int, str]  # bytes, hexadecimal


class Mismatch(ValueError):
  """A file is not what it was when its checksum was taken; the message names it."""


def checksum(path: Path) -> Checksum:
  """Of one file, read from the beginning to the end."""
  found, size, block = xxhash.xxh3_128(), 0, memoryview(bytearray(BLOCK))
  with open(path, "rb", buffering=0) as file:
    while count := file.readinto(block):
      found.update(block[:count])
      size += count
  return size, found.hexdigest()


def write(folder: Path, names: Iterable[str]):
  """Reads the files `names` of a folder and writes their checksums there."""
  names = sorted(names)
  with ThreadPoolExecutor(THREADS) as threads:
    note(folder, dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True)))


def note(folder: Path, found: Mapping[str, Checksum]):
  """Writes checksums, name -> checksum, of files of a folder."""
  files.write(folder / NAME, files.to_json({KIND: found}))


def verify(folder: Path, inside: Iterable[str] = (), part: tuple[int, int] = (0, 1)) -> bool:
  """Compares the files of a folder with their checksums; False where it has none.

  A file is read once by a process, as long as its size, its time and its inode stay.

  Args:
    folder: with or without checksums.
    inside: only files in these folders of it; all where there are none.
    part: (i, n): every nth file alone, from the ith: the share of a host.

  Raises:
    Mismatch: a file is missing, or has other bytes.
    OSError: a file cannot be read.
  """
  known = _known(folder)
  if known is None:
    return False
  wanted = tuple(inside)
  names = [name for name in sorted(known) if not wanted or name.partition("/")[0] in wanted]
  with ThreadPoolExecutor(THREADS) as threads:
    list(threads.map(lambda name: _compare(folder / name, name, known[name]), names[part[0] :: part[1]]))
  return True


def _known(folder: Path) -> dict[str, Checksum] | None:
  try:
    fields = json.loads((folder / NAME).read_bytes())
    return {name: (int(size), str(digest)) for name, (size, digest) in fields[KIND].items()}
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise Mismatch(f"{NAME} does not hold checksums any more: {error}") from None


def _compare(path: Path, name: str, expected: Checksum):
  try:
    stat = path.stat()
  except (FileNotFoundError, NotADirectoryError):
    raise Mismatch(f"{name} is missing") from None
  if stat.st_size != expected[0]:
    raise Mismatch(f"{name} has {stat.st_size:,} bytes and had {expected[0]:,}")
  if not _equal(path, expected, (stat.st_mtime_ns, stat.st_ino, stat.st_dev)):
    raise Mismatch(f"{name} has other bytes than were written: its checksum differs")


@functools.lru_cache(maxsize=2**16)
def _equal(path: Path, expected: Checksum, _state: tuple[int, ...]) -> bool:
  return checksum(path) == expected
