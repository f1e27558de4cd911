"""Batches in a temporary file: a text may be longer than memory, and is read once and walked over many times."""

import tempfile
from collections.abc import Iterable, Sequence

import numpy as np


class Spool(Sequence):
  """A sequence of dicts of int32 arrays of one shape, mapped from a file that goes when the last part of it does.

  Attributes:
    keys: of the dicts.
    arrays: [n, keys, ...] int32.
  """

  def __init__(self, keys: Sequence[str], arrays: np.ndarray):
    self.keys, self.arrays = tuple(keys), arrays

  def __len__(self) -> int:
    return len(self.arrays)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Spool(self.keys, self.arrays[index])
    return dict(zip(self.keys, self.arrays[index], strict=True))


def spool(batches: Iterable[dict[str, np.ndarray]]) -> Spool | None:
  """Writes batches, all with the keys of the first, as they come; None if there are none."""
  keys, shape, number = (), (), 0
  with tempfile.TemporaryFile() as file:  # in the folder of TMPDIR; without a name from the start
    for batch in batches:
      keys = keys or tuple(batch)
      stacked = np.stack([batch[key] for key in keys]).astype(np.int32)
      shape, number = stacked.shape, number + 1
      file.write(stacked.tobytes())
    file.flush()
    return Spool(keys, np.asarray(np.memmap(file, np.int32, "r", shape=(number, *shape)))) if number else None
