import json
import os
from pathlib import Path

import ml_collections
import numpy as np
import pytest

TEST_DATA = Path(os.environ.get("TSPARSE_TEST_DATA", Path(__file__).parents[2].parent / "shared/data"))


@pytest.fixture
def mistral() -> str:
  path = TEST_DATA / "tokenizers/mistral_v1.model"
  if not path.exists():
    pytest.skip(f"{path} is absent; set TSPARSE_TEST_DATA")
  return str(path)


@pytest.fixture
def jsonl(tmp_path) -> str:
  """60 documents "doc <i> ..." of 8 to 300 bytes."""
  rng = np.random.default_rng(0)
  path = tmp_path / "documents.jsonl"
  texts = [f"doc {i} " + "x" * int(rng.integers(1, 300)) for i in range(60)]
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  return str(path)


def settings(train, validation="", vocabulary="bytes", eos=True, lanes=1, **others):
  fields = {"train": str(train), "validation": str(validation), "vocabulary": vocabulary, "eos": eos, "lanes": lanes}
  return ml_collections.ConfigDict(fields | others)


def documents_of(batches):
  """The complete documents, as bytes, of rows laid end to end."""
  flat = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
  pieces = np.split(flat, np.flatnonzero(flat == 1) + 1)[:-1]
  return [bytes((p[:-1] - 3).astype(np.uint8)) for p in pieces]
