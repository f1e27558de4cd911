import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from tests.data.conftest import documents_of, settings
from tsparse.data import check_data, evaluation_batches, train_iterator
from tsparse.data.sources import held_out_splits, read_documents
from tsparse.errors import UserError


def train(data, seed=1, **kwargs):
  return train_iterator(data, **({"seq_len": 32, "batch_size": 4, "seed": seed} | kwargs))


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def same(a, b):
  return all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_batches_are_packed_int32_and_deterministic(jsonl):
  data = settings(jsonl)
  first = take(train(data), 20)
  assert first[0].keys() == {"inputs", "targets", "segment_ids", "positions"}
  assert all(v.shape == (4, 32) and v.dtype == np.int32 for v in first[0].values())
  assert same(first, take(train(data), 20))
  assert not same(first, take(train(data, seed=2), 20))


def test_every_epoch_holds_every_training_document_once_in_another_order(jsonl):
  documents = held_out_splits(read_documents(jsonl))["train"]
  expected = [documents.read(i) for i in range(len(documents))]
  got = documents_of(take(train(settings(jsonl)), 300))
  n = len(expected)
  assert sorted(got[:n]) == sorted(got[n : 2 * n]) == sorted(expected)
  assert got[:n] != got[n : 2 * n]


def test_the_shards_of_two_hosts_are_disjoint_and_cover_the_data(jsonl):
  documents = held_out_splits(read_documents(jsonl))["train"]
  expected = [documents.read(i) for i in range(len(documents))]
  half = len(expected) // 2
  got = []
  for host in range(2):
    it = train(settings(jsonl), host=host, num_hosts=2)
    batches = take(it, 150)
    assert batches[0]["targets"].shape == (2, 32)
    got += documents_of(batches)[: half + (host == 0 and len(expected) % 2)]
  assert Counter(got) == Counter(expected)


CONTINUE = """
import sys, numpy as np, tsparse.data, ml_collections
assert not {"tensorflow", "seqio", "jax"} & set(sys.modules)
train, state, out = sys.argv[1:]
from tsparse.data.tensorflow import load_tensorflow
tf = load_tensorflow()[1]
tf.config.threading.set_inter_op_parallelism_threads(3)
data = ml_collections.ConfigDict({"train": train, "validation": "", "vocabulary": "bytes", "eos": True})
it = tsparse.data.train_iterator(data, seq_len=32, batch_size=4, seed=1)
it.restore(open(state, "rb").read())
np.save(out, [next(it)["targets"] for _ in range(200)])
"""


def test_a_saved_position_continues_bit_for_bit_in_another_process(jsonl, tmp_path):
  it = train(settings(jsonl))
  take(it, 123)  # into the second epoch
  (tmp_path / "state").write_bytes(it.state())
  expected = take(it, 200)
  again = train(settings(jsonl))
  next(again)
  again.restore((tmp_path / "state").read_bytes())
  assert same(take(again, 200), expected)
  command = [sys.executable, "-c", CONTINUE, jsonl, str(tmp_path / "state"), str(tmp_path / "out.npy")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stderr) == (0, "")  # TensorFlow is silent, and the process ends
  np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), [b["targets"] for b in expected])


def test_a_position_of_another_run_is_refused(jsonl, tmp_path):
  state = train(settings(jsonl)).state()
  other = tmp_path / "other.jsonl"
  other.write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(60)))
  for changed, key in (
    (train(settings(jsonl), seq_len=16), "seq_len was 32 and is 16"),
    (train(settings(jsonl), seed=5), "seed was 1 and is 5"),
    (train(settings(jsonl), num_hosts=2), "host was 0 of 1 and is 0 of 2"),
    (train(settings(other)), "data.train was"),
  ):
    with pytest.raises(UserError, match=key):
      changed.restore(state)
  with pytest.raises(UserError, match="cannot be read"):
    train(settings(jsonl)).restore(b"nonsense")


def test_evaluation_takes_whole_documents_in_a_fixed_order(jsonl):
  data = settings(jsonl, validation=jsonl.replace("documents", "held_out"))
  with open(jsonl) as source, open(data.validation, "w") as f:
    f.writelines(line.replace("doc", "eval") for line in source)
  every = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=10**6)
  documents = read_documents(data.validation)
  assert sorted(documents_of(every.batches)) == sorted(documents.read(i) for i in range(60))
  assert every.tokens == sum(int((b["segment_ids"] > 0).sum()) for b in every.batches)
  assert every.padding == pytest.approx(np.mean([b["segment_ids"] == 0 for b in every.batches]))
  some = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=2000)
  assert some.tokens <= 2000 < some.tokens + 310
  assert documents_of(some.batches) == documents_of(every.batches)[: some.documents]
  assert every.complete and not some.complete
  for limit in (1, 5):  # less than the first document: it is cut
    cut = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=limit)
    assert (cut.documents, cut.tokens, cut.complete) == (1, limit, False)
    assert (cut.batches[0]["targets"][0, :limit] == every.batches[0]["targets"][0, :limit]).all()
  assert {b["targets"].shape for b in every.batches} == {(4, 64)}
  data.eos = False
  without = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=10**6)
  assert without.tokens == every.tokens - 60 and not any((b["targets"] == 1).any() for b in without.batches)


def test_sentencepiece_gives_its_own_encoding(mistral, tmp_path):
  import sentencepiece

  texts = ["Hello world", "  two  spaces\n\ttab", "naïve 日本語 🙂", "def f(x):\n  return x\n"]
  path = tmp_path / "d.jsonl"
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  data = settings(path, path, mistral)
  with pytest.raises(UserError, match="is in data.train too"):
    evaluation_batches(data, seq_len=64, batch_size=1, max_tokens=1000)
  data.train = "stdlib"
  found = evaluation_batches(data, seq_len=64, batch_size=1, max_tokens=1000)
  model = sentencepiece.SentencePieceProcessor(model_file=mistral)
  rows = [{k: v[0] for k, v in b.items()} for b in found.batches]
  got = [r["targets"][r["segment_ids"] == s].tolist() for r in rows for s in range(1, r["segment_ids"].max() + 1)]
  assert sorted(got) == sorted(model.encode(t) + [model.eos_id()] for t in texts)
  assert rows[0]["inputs"][0] == model.bos_id() == 1
  with pytest.raises(UserError, match="has 32000 ids and the model embeds 259"):
    check_data(data, 259)
