import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tests.data.conftest import documents_of, settings
from tsparse.data import (
  DataSettings,
  NoText,
  accounts_at,
  check_data,
  evaluation_batches,
  merge_positions,
  train_iterator,
)
from tsparse.data.accounting import pack, unpack
from tsparse.data.encoding import Encoder, load_tokenizer, make_encoder
from tsparse.data.iterator import _evaluation_set
from tsparse.data.lanes import Mixer
from tsparse.data.limit import First
from tsparse.data.packing import Piece
from tsparse.data.resolve import Source
from tsparse.data.sources import held_out_splits, read_documents
from tsparse.data.streams import FileStream
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
  assert first[0].keys() == {"inputs", "targets", "segment_ids", "positions", "loss_mask"}
  assert all(v.shape == (4, 32) and v.dtype == np.int32 for v in first[0].values())
  assert same(first, take(train(data), 20))
  assert not same(first, take(train(data, seed=2), 20))


def test_documents_that_are_read_ahead_change_nothing(jsonl, monkeypatch):
  together = take(train(settings(jsonl)), 40)
  monkeypatch.setattr("tsparse.data.streams.AHEAD", 1)
  assert same(together, take(train(settings(jsonl)), 40))


def test_every_epoch_holds_every_training_document_once_in_another_order(jsonl):
  documents = held_out_splits(read_documents(jsonl))["train"]
  expected = [documents.read(i) for i in range(len(documents))]
  got = documents_of(take(train(settings(jsonl)), 300))
  n = len(expected)
  assert sorted(got[:n]) == sorted(got[n : 2 * n]) == sorted(expected)
  assert got[:n] != got[n : 2 * n]


def test_lanes_are_disjoint_and_cover_the_data(jsonl):
  documents = held_out_splits(read_documents(jsonl))["train"]
  expected = Counter(documents.read(i) for i in range(len(documents)))
  batches = take(train(settings(jsonl, lanes=4)), 300)
  drawn = [documents_of([{k: v[lane : lane + 1] for k, v in b.items()} for b in batches]) for lane in range(4)]
  for epoch in range(3):  # documents n epoch .. n epoch + n - 1 of the one sequence that the lanes share
    places = range(epoch * len(documents), (epoch + 1) * len(documents))
    assert Counter(drawn[place % 4][place // 4] for place in places) == expected


def test_more_lanes_than_documents_all_have_some(tmp_path):
  (tmp_path / "two.jsonl").write_text('{"text": "first"}\n{"text": "again"}\n')
  batch = next(train(settings(tmp_path / "two.jsonl", lanes=8), batch_size=8, seq_len=12))
  documents = [documents_of([{k: v[row : row + 1] for k, v in batch.items()}])[0] for row in range(8)]
  assert Counter(documents) == {b"first": 4, b"again": 4}


@pytest.mark.parametrize(
  "parts", [[[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 2, 3], [2, 3, 4, 5, 6, 7]], [[0], [*range(1, 8)]]]
)
def test_hosts_make_the_rows_of_one_and_go_on_with_each_others_positions(jsonl, parts):
  """Whatever rows each host has, lanes shared by hosts included."""
  data = settings(jsonl, lanes=4)
  alone = train(data, batch_size=8)
  hosts = [train(data, batch_size=8, rows=rows) for rows in parts]
  for _ in range(40):
    expected = next(alone)
    for host, rows in zip(hosts, parts, strict=True):
      batch = next(host)
      assert all((batch[key][rows] == expected[key][rows]).all() for key in batch)
  assert hosts[0].lanes == sorted({row // 2 for row in parts[0]})
  position = merge_positions([host.state() for host in hosts])
  assert accounts_at(position) == accounts_at(alone.state())
  expected = take(alone, 5)
  whole = train(data, batch_size=8)
  whole.restore(position)
  assert same(take(whole, 5), expected)
  split = train(data, batch_size=8, rows=[4, 5])
  split.restore(position)
  assert all(
    (split_batch["targets"][4:6] == e["targets"][4:6]).all() for split_batch, e in zip(split, expected, strict=False)
  )
  if len(hosts[0].lanes) < 4:
    with pytest.raises(UserError, match="of 4 lanes and this host reads lanes"):
      train(data, batch_size=8).restore(hosts[0].state())


@pytest.mark.parametrize(("rows", "asked", "made"), [(12, 8, 6), (2, 8, 2), (7, 4, 1), (9, 8, 3), (16, 8, 8)])
def test_lanes_that_do_not_divide_a_batch_are_the_most_below_that_do(jsonl, rows, asked, made):
  found, same_as = (train(settings(jsonl, lanes=lanes), batch_size=rows) for lanes in (asked, made))
  assert found.lanes == [*range(made)] and same(take(found, 2), take(same_as, 2))
  found.restore(same_as.state())  # the position is that of the lanes there are
  with pytest.raises(UserError, match="config.data.lanes is 0"):
    train(settings(jsonl, lanes=0), batch_size=rows)


CONTINUE = """
import sys, numpy as np, tsparse.data, ml_collections
train, state, out = sys.argv[1:]
data = ml_collections.ConfigDict({"train": train, "lanes": 1})
it = tsparse.data.train_iterator(data, seq_len=32, batch_size=4, seed=1)
it.restore(open(state, "rb").read())
np.save(out, [next(it)["targets"] for _ in range(200)])
assert not {"tensorflow", "seqio", "jax", "pyarrow", "zstandard"} & set(sys.modules)
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
  assert (done.returncode, done.stderr) == (0, "")
  np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), [b["targets"] for b in expected])


def test_a_position_of_another_run_is_refused(jsonl, tmp_path):
  state = train(settings(jsonl)).state()
  other = tmp_path / "other.jsonl"
  other.write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(60)))
  for changed, key in (
    (train(settings(jsonl), seq_len=16), "seq_len was 32 and is 16"),
    (train(settings(jsonl), seed=5), "seed was 1 and is 5"),
    (train(settings(jsonl, lanes=2)), "lanes was 1 and is 2"),
    (train(settings(jsonl, eos=False)), "data.eos was True and is False"),
    (train(settings(jsonl, bos="off")), "data.bos was on and is off"),
    (train(settings(other)), "data.train was"),
  ):
    with pytest.raises(UserError, match=key):
      changed.restore(state)
  with pytest.raises(UserError, match="cannot be read"):
    train(settings(jsonl)).restore(b"nonsense")
  former = unpack(state)
  del former["fingerprint"]["data.bos"]  # saved before there was a choice: with BOS
  train(settings(jsonl)).restore(pack(former))
  with pytest.raises(UserError, match="data.bos was on and is off"):
    train(settings(jsonl, bos="off")).restore(pack(former))


def test_documents_without_bos_are_counted_by_their_targets(tmp_path):
  texts = ["abc", "d", "efgh" * 20, "i", "jk"]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  data = settings("", validation=str(tmp_path / "a.jsonl"), eos=False)
  sizes = {"seq_len": 16, "batch_size": 2}
  off = settings("", validation=data.validation, eos=False, bos="off")
  whole, without = (evaluation_batches(each, max_tokens=1000, **sizes) for each in (data, off))
  assert (whole.bos, without.bos, whole.documents, without.documents) == (True, False, 5, 5)
  assert (whole.tokens, without.tokens, without.complete) == (87, 82, True)
  found = {}
  for batch, ids in zip(without.batches, without.document_ids, strict=True):
    assert ((ids >= 0) == (batch["segment_ids"] > 0)).all()
    for document in set(ids[ids >= 0].tolist()):
      chosen = ids == document
      first = "" if document in found else chr(batch["inputs"][chosen][0] - 3)
      found[document] = found.get(document, first) + bytes((batch["targets"][chosen] - 3).tolist()).decode()
  assert sorted(found.values()) == sorted(text for text in texts if len(text) > 1)
  for limit in (1, 79, 80):  # what is cut is not taken for whole
    cut = evaluation_batches(off, max_tokens=limit, **sizes)
    assert cut.tokens <= limit and not cut.complete
  with pytest.raises(UserError, match="config.data.bos is 'never': set it to auto, on, off"):
    check_data(settings(tmp_path / "a.jsonl", validation=data.validation, bos="never"), 512)


def test_evaluation_takes_documents_in_a_fixed_order(jsonl):
  data = settings(jsonl, validation=jsonl.replace("documents", "held_out"))
  with open(jsonl) as source, open(data.validation, "w") as f:
    f.writelines(line.replace("doc", "eval") for line in source)
  every = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=10**6)
  documents = read_documents(data.validation)
  assert sorted(documents_of(every.batches)) == sorted(documents.read(i) for i in range(60))
  assert every.tokens == sum(int((b["segment_ids"] > 0).sum()) for b in every.batches)
  assert every.padding == pytest.approx(np.mean([b["segment_ids"] == 0 for b in every.batches]))
  some = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=2000)
  assert (some.tokens, some.cut) == (2000, 1) and "1 of the documents cut at the 2,000 tokens" in some.note
  assert documents_of(some.batches) == documents_of(every.batches)[: some.documents - 1]
  assert every.cut == 0 and every.note == "all of the text: 1,000,000 tokens were asked for"
  assert every.complete and not some.complete
  for limit in (1, 5):  # less than the first document: it is cut
    cut = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=limit)
    assert (cut.documents, cut.tokens, cut.complete, cut.cut) == (1, limit, False, 1)
    assert (cut.batches[0]["targets"][0, :limit] == every.batches[0]["targets"][0, :limit]).all()
  assert {b["targets"].shape for b in every.batches} == {(4, 64)}
  data.eos = False
  without = evaluation_batches(data, seq_len=64, batch_size=4, max_tokens=10**6)
  assert without.tokens == every.tokens - 60 and not any((b["targets"] == 1).any() for b in without.batches)


def test_a_document_that_does_not_fit_is_cut_to_the_rest(tmp_path, monkeypatch):
  stories = [f"story {i} " + "s" * (i % 50) for i in range(12)]
  path = tmp_path / "stories.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*stories, "long " * 200_000]))
  encoded = []
  piece = Encoder.piece
  monkeypatch.setattr(Encoder, "piece", lambda *args: encoded.append(args[2]) or piece(*args))
  arguments = {"seq_len": 64, "batch_size": 8}
  found = evaluation_batches(settings("", path), max_tokens=20_000, **arguments)
  assert (found.tokens, found.cut, found.complete) == (20_000, 1, False) and 1 < found.documents <= 13
  assert len(encoded) <= 6  # pieces of the long one, of 4096 to 8192 characters each
  ids, targets = np.stack(found.document_ids), np.stack([batch["targets"] for batch in found.batches])
  texts = [bytes((targets[ids == i] - 3).clip(0).astype(np.uint8)).decode() for i in range(found.documents)]
  assert all(text.rstrip("\0") in stories for text in texts[:-1]) and ("long " * 4000).startswith(texts[-1])
  del encoded[:]
  others = evaluation_batches(settings("", path), max_tokens=20_000, skip=found.taken, **arguments)
  assert others.documents + found.documents == 13 and others.complete and not encoded  # not the end of the long one
  with pytest.raises(NoText):
    evaluation_batches(settings("", path), max_tokens=9, skip=[13], **arguments)


def test_sources_of_a_mixture_are_cut_in_their_shares(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} " * 100_000}) + "\n")
  sources = [(Source(name, weight, documents={"all": read_documents(str(tmp_path / f"{name}.jsonl"))}), "all")
             for name, weight in (("a", 0.75), ("b", 0.25))]  # fmt: skip
  found = _evaluation_set(sources, DataSettings(), 64, 8, 80_000)
  targets = np.concatenate([batch["targets"][batch["segment_ids"] > 0] for batch in found.batches])
  assert (found.documents, found.cut, found.tokens, found.taken) == (2, 2, 80_000, (1, 1))
  assert (targets == ord("a") + 3).sum() == pytest.approx(30_000, abs=8192)


def test_without_bos_the_first_tokens_of_documents_are_not_counted():
  documents = [np.arange(n) for n in (3, 1, 4, 9)]
  stream = SimpleNamespace(taken=4, next_piece=lambda: Piece(next(tokens)))
  for bos, limit, lengths in ((None, 5, [3, 1, 4]), (None, 7, [3, 1, 4, 3]), (0, 7, [3, 1, 3])):
    given, tokens = [], iter(documents)
    found = First(Mixer([stream], [1.0], [1], (0,)), limit, bos)
    for piece in found.documents(lambda given=given, bos=bos: sum(len(p.tokens) - (bos is None) for p in given)):
      given.append(piece)
    assert [len(piece.tokens) for piece in given] == lengths and not found.complete


@pytest.fixture
def letters(tmp_path) -> str:
  """A vocabulary of letters, in which white space has no tokens."""
  made = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1} | {chr(95 + i): i for i in range(2, 28)}, "<unk>"))
  split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
  made.pre_tokenizer = pre_tokenizers.Sequence(split)
  (tmp_path / "letters").mkdir()
  made.save(str(tmp_path / "letters/tokenizer.json"))
  (tmp_path / "letters/config.json").write_text('{"eos_token_id": 0}')
  return str(tmp_path / "letters")


SPACES = [
  [
    "ab" * 10 + " " * 50,
    "c" * 12,
    " " * 70 + "d" * 12,
    "ef" * 8 + " " * 65 + "g" * 9,
    "\u3000",
  ],  # at each end, inside, all
  [" " * 200 + "k"],  # more pieces without tokens than documents
]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("texts", SPACES)
def test_pieces_without_tokens_keep_documents_apart(eos, texts, letters, tmp_path, monkeypatch):
  monkeypatch.setattr("tsparse.data.encoding.PIECE", 20)
  monkeypatch.setattr("tsparse.data.encoding.PIECE_PER_TOKEN", 1)
  path, tokenizer = tmp_path / "spaces.jsonl", load_tokenizer(letters)
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  expected = sorted(filter(None, (tokenizer.encode(text) + [0] * eos for text in texts)))

  stream = FileStream(read_documents(str(path)), make_encoder(tokenizer, eos, 8), (0,), 0, 1, epochs=2)
  documents, previous = [], None
  while piece := stream.next_piece():
    assert piece.context == previous  # None, for BOS, at each beginning and nowhere else
    documents += [[]] if previous is None else []
    documents[-1] += piece.tokens.tolist()
    previous = None if piece.ends else documents[-1][-1]
    stream.restore(json.loads(json.dumps(stream.state())))
  assert sorted(documents) == sorted(2 * expected)

  data = settings("", path, letters, eos, bos="on")
  found = evaluation_batches(data, seq_len=8, batch_size=2, max_tokens=10**6)
  ids, real = np.stack(found.document_ids), np.stack([batch["segment_ids"] for batch in found.batches]) > 0
  targets = np.stack([batch["targets"] for batch in found.batches])
  assert sorted(targets[ids == i].tolist() for i in range(found.documents)) == expected
  assert ((ids >= 0) == real).all() and found.tokens == real.sum()


def test_sentencepiece_gives_its_own_encoding(mistral, tmp_path):
  import sentencepiece

  texts = ["Hello world", "  two  spaces\n\ttab", "naïve 日本語 🙂", "def f(x):\n  return x\n"]
  path = tmp_path / "d.jsonl"
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  data = settings(path, path, mistral)
  with pytest.raises(UserError, match="4 of 4 held-out documents .* are trained on too"):
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
