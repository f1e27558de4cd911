"""What the checksums of a checkpoint cost: files of random bytes, read as they are and hashed, warm and cold.

python benchmarks/checksums.py                          (14 GB, as Mistral-7B in bfloat16; as much disk while it runs)
python benchmarks/checksums.py --gigabytes=2 --json=checksums.json

`read` is the same files through the same threads without a hash: the least that comparing them can take. Warm files are
in the system's cache, if it holds them all; cold ones were dropped from it before. Figures: benchmarks/README.md.
"""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import checksums, cli, files
from tsparse.errors import UserError

GIGABYTES = flags.DEFINE_float("gigabytes", 14.0, "Of all files together.")
FILE_MEGABYTES = flags.DEFINE_float("file_megabytes", 500.0, "Of one file; convert.py writes such shards.")
FOLDER = flags.DEFINE_string("folder", tempfile.gettempdir(), "Where the files are, for as long as it takes.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Times each is measured; the least counts.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")


def make(folder: Path, total: int, size: int) -> list[str]:
  """Writes files of `size` bytes, `total` together, on the disk -> their names."""
  block, names = os.urandom(1 << 24), []
  while total > 0:
    names.append(f"{len(names):05d}")
    with open(folder / names[-1], "wb") as file:
      left = min(size, total)
      total -= left
      while left > 0:
        left -= file.write(block[:left])
      file.flush()
      os.fsync(file.fileno())
  return names


def drop(folder: Path, names: list[str]):
  """Takes the files out of the system's cache."""
  for name in names:
    with open(folder / name, "rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path, names: list[str]):
  """Reads the files as `checksums.write` does, and makes nothing of them."""

  def through(name: str):
    block = memoryview(bytearray(checksums.BLOCK))
    with open(folder / name, "rb", buffering=0) as file:
      while file.readinto(block):
        pass

  with ThreadPoolExecutor(checksums.THREADS) as threads:
    list(threads.map(through, names))


def least(work: Callable[[], None], before: Callable[[], None]) -> float:
  """The least seconds of `work`; `before` is done before each."""
  found = []
  for _ in range(REPEATS.value):
    before()
    start = time.monotonic()
    work()
    found.append(time.monotonic() - start)
  return min(found)


def main():
  """Makes the files, measures, prints a table."""
  total, size = int(GIGABYTES.value * 1e9), int(FILE_MEGABYTES.value * 1e6)
  if min(total, size, REPEATS.value) <= 0:
    raise UserError("--gigabytes, --file_megabytes and --repeats must be positive.")
  rows = []
  with tempfile.TemporaryDirectory(prefix="tsparse-checksums-", dir=FOLDER.value) as name:
    folder = Path(name)
    names = make(folder, total, size)

    def verify():
      checksums._equal.cache_clear()  # what this process has compared it does not compare again
      assert checksums.verify(folder)

    for state, before in (("warm", lambda: read(folder, names)), ("cold", lambda: drop(folder, names))):
      for what, work in (
        ("read", lambda: read(folder, names)),
        ("take", lambda: checksums.write(folder, names)),
        ("compare", verify),
      ):
        seconds = least(work, before)
        rows.append({"files": state, "what": what, "seconds": seconds, "gigabytes_per_second": total / seconds / 1e9})
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  print(f"{total / 1e9:g} GB in {len(names)} files, {checksums.THREADS} threads, at most {peak:,.0f} MiB in memory")
  print(f"{'':14}{'seconds':>9}{'GB/s':>8}")
  for row in rows:
    print(f"{row['files']:6}{row['what']:8}{row['seconds']:9.2f}{row['gigabytes_per_second']:8.2f}")
  if JSON.value:
    files.write(Path(JSON.value), files.to_json({"rows": rows, "peak_mebibytes": peak}))


if __name__ == "__main__":
  cli.script(main, __doc__)
