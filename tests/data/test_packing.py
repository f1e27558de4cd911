import json

import numpy as np
import pytest

from tsparse.data.packing import KEYS, Packer, Piece, stack_rows

BOS = 7


def documents(seed=0, n=40):
  rng = np.random.default_rng(seed)
  return [rng.integers(10, 1000, rng.integers(1, 50)) for _ in range(n)]


def pack(docs, seq_len, split, bos=BOS):
  packer, rows = Packer(map(Piece, docs), seq_len, bos, split_documents=split), []
  while True:
    try:
      rows.append(packer.next_row())
    except StopIteration:
      return rows


def oracle(docs, seq_len, split):
  """The same rows, one (input, target, segment, position) at a time."""
  rows, row = [], []
  for doc in docs:
    if not split and len(doc) > seq_len - len(row):
      rows, row = rows + [row], []
    segment, position = (row[-1][2] if row else 0) + 1, 0
    for previous, token in zip([BOS, *doc], doc, strict=False):
      if len(row) == seq_len:
        rows, row, segment, position = rows + [row], [], 1, 0
      row = row + [(previous, token, segment, position)]
      position += 1
  return [r + [(0, 0, 0, 0)] * (seq_len - len(r)) for r in rows + [row] if r]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("seq_len", [1, 16, 64])
def test_rows_match_an_oracle(split, seq_len):
  docs = documents(seq_len)
  rows = pack(docs, seq_len, split)
  keys = KEYS[:4]
  got = [list(zip(*(r[k].tolist() for k in keys), strict=True)) for r in rows]
  assert got == oracle(docs, seq_len, split)
  assert all(r[k].dtype == np.int32 and r[k].shape == (seq_len,) for r in rows for k in keys)


@pytest.mark.parametrize("split", [True, False])
def test_without_bos_the_first_token_of_a_document_is_context_and_predicted_by_nothing(split):
  docs = [*documents(1), np.array([5]), np.array([6, 8])]  # of one token there is nothing to predict
  want = pack([doc[1:] for doc in docs if len(doc) > 1], 16, split)
  rows, starts = pack(docs, 16, split, bos=None), iter([doc[0] for doc in docs if len(doc) > 1])
  for row, expected in zip(rows, want, strict=True):
    for key in KEYS[1:]:
      np.testing.assert_array_equal(row[key], expected[key])
    begins = (row["segment_ids"] > 0) & (expected["inputs"] == BOS)  # no token of a document is 7
    assert row["inputs"][begins].tolist() == [next(starts) for _ in range(begins.sum())]
    np.testing.assert_array_equal(row["inputs"][~begins], expected["inputs"][~begins])
  assert next(starts, None) is None
  context, mask = Piece(np.array([3, 4]), context=9), np.array([0, 1])
  packer = Packer(iter([Piece(np.array([1, 2]), mask, ends=False), context]), 3, None, split_documents=True)
  row = packer.next_row()  # only the first piece of a document begins it
  assert [row[key].tolist() for key in ("inputs", "targets", "loss_mask")] == [[1, 9, 3], [2, 3, 4], [1, 1, 1]]


@pytest.mark.parametrize("split", [True, False])
def test_every_token_is_a_target_once_and_in_order(split):
  docs = documents()
  rows = pack(docs, 24, split)
  targets = np.concatenate([r["targets"][r["segment_ids"] > 0] for r in rows])
  np.testing.assert_array_equal(targets, np.concatenate(docs))


def test_training_rows_are_full():
  rows = pack(documents(), 24, True)
  assert all((r["segment_ids"] > 0).all() for r in rows[:-1])


def test_evaluation_cuts_only_documents_longer_than_a_row():
  docs = documents()
  rows = pack(docs, 24, False)
  pieces = sum(int(r["segment_ids"].max()) for r in rows)
  assert pieces == sum(-(-len(d) // 24) for d in docs)


def test_a_restored_packer_continues():
  docs = documents()
  stream = map(Piece, docs)
  packer = Packer(stream, 16, BOS, split_documents=True)
  for _ in range(5):
    packer.next_row()
  other = Packer(stream, 16, BOS, split_documents=True)
  other.restore(packer.state())
  expected = pack(docs, 16, True)[5]
  for key, value in other.next_row().items():
    np.testing.assert_array_equal(value, expected[key])


def test_a_short_batch_is_filled_with_empty_rows():
  batch = stack_rows(pack(documents(), 24, False)[:2], 4)
  assert batch["targets"].shape == (4, 24)
  assert not batch["segment_ids"][2:].any()


def test_the_next_piece_of_a_document_continues_it():
  doc = np.arange(10, 40)
  pieces = [Piece(doc[:12], ends=False), Piece(doc[12:], context=int(doc[11])), Piece(np.array([50, 51]))]
  packer = Packer(iter(pieces), 16, BOS, split_documents=True)
  rows = [packer.next_row() for _ in range(2)]
  np.testing.assert_array_equal(np.concatenate([row["targets"] for row in rows]), [*doc, 50, 51])
  np.testing.assert_array_equal(np.concatenate([row["inputs"] for row in rows]), [BOS, *doc[:-1], BOS, 50])
  assert rows[0]["segment_ids"].tolist() == [1] * 12 + [2] * 4


def test_what_is_not_scored_stays_so():
  rng = np.random.default_rng(2)
  docs = documents(2)
  masks = [rng.integers(0, 2, len(doc)) for doc in docs]
  packer = Packer(map(Piece, docs, masks), 24, BOS, split_documents=True)
  rows = []
  for _ in range(sum(map(len, docs)) // 24):
    packer.restore(json.loads(json.dumps(packer.state())))
    rows.append(packer.next_row())
  got = np.concatenate([row["loss_mask"] for row in rows])
  np.testing.assert_array_equal(got, np.concatenate(masks)[: len(got)])
  assert all((row["segment_ids"] > 0).all() for row in rows)
