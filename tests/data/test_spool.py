"""A spool gives back what was put in, from a file without a name, and takes one batch at a time."""

import gc
import weakref

import numpy as np

from tsparse.data.spool import spool


def test_batches_come_back_and_none_is_kept():
  made = []

  def batches():
    for i in range(5):
      gc.collect()
      assert sum(ref() is not None for ref in made) <= 1  # memory is that of a batch
      batch = {"one": np.full((2, 3), i, np.int32), "two": np.arange(6, dtype=np.int32).reshape(2, 3) * i}
      made.append(weakref.ref(batch["one"]))
      yield batch

  found = spool(batches())
  assert len(found) == 5 and list(found[3]) == ["one", "two"]
  for i, batch in enumerate(found):
    assert (batch["one"] == i).all() and (batch["two"] == np.arange(6).reshape(2, 3) * i).all()
  assert [int(batch["one"][0, 0]) for batch in found[1:4]] == [1, 2, 3] and len(found[:2]) == 2
  assert spool([]) is None
