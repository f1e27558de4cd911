"""Mixtures: their declarations, how names become sources, exact shares by tokens, accounts."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import documents_of, settings
from tsparse.data import (
  account_metrics,
  accounts_at,
  check_data,
  data_settings,
  describe,
  evaluation_batches,
  evaluation_by_source,
  resolve,
  train_iterator,
)
from tsparse.data.mixtures import MIXTURES, TURBOSPARSE_150B
from tsparse.data.resolve import parse_mixture
from tsparse.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


def write(path, texts, field="text"):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


@pytest.fixture
def root(tmp_path):
  """Sources a (short documents), b (documents 20 times as long) and c, of 300, 60 and 100 documents."""
  write(tmp_path / "a" / "x.jsonl", [f"a{i} " + "a" * (i % 17) for i in range(300)])
  write(tmp_path / "b.jsonl", [f"b{i} " + "b" * (200 + i % 50) for i in range(60)])
  write(tmp_path / "c" / "y.jsonl", [f"c{i} " + "c" * 30 for i in range(100)])
  return tmp_path


def mixture(root, text, lanes=4, **others):
  return settings("", mixture=text, root=str(root), lanes=lanes, **others)


def test_table_4_adds_up():
  assert len(TURBOSPARSE_150B) == 15 and math.fsum(s.weight for s in TURBOSPARSE_150B) == pytest.approx(100, abs=1e-9)
  totals = {}
  for source in TURBOSPARSE_150B:
    totals[source.category] = totals.get(source.category, 0) + round(100 * source.weight)
  assert totals == {"academic": 1052, "web": 7464, "books": 691, "math": 276, "code": 517}  # hundredths of a percent
  names = [source.name for members in MIXTURES.values() for source in members]
  assert len(set(names)) == len(names) and all(source.get for source in TURBOSPARSE_150B)
  assert len({source.category for source in MIXTURES["stories_mixture"]}) == 6


def test_shares_of_tokens_are_exact_to_within_documents_in_every_lane(root):
  weights = {"a": 0.2, "b.jsonl": 0.5, "c": 0.3}
  data = mixture(root, ",".join(f"{name}:{weight * 7}" for name, weight in weights.items()))
  iterator = train_iterator(data, seq_len=64, batch_size=8, seed=3)
  longest = {"a": 25, "b.jsonl": 260, "c": 40}
  for batches in (20, 200):
    for _ in range(batches):
      next(iterator)
    tally = json.loads(iterator.tally())
    for lane in tally["lanes"].values():
      total = sum(lane["drawn"])
      for (name, weight), drawn in zip(weights.items(), lane["drawn"], strict=True):
        assert abs(drawn - weight * total) <= 2 * longest[name] + max(longest.values())
  accounts = {account["name"]: account for account in accounts_at(iterator.state())}
  for name, weight in weights.items():
    assert accounts[name]["target"] == pytest.approx(weight)
    assert accounts[name]["share"] == pytest.approx(weight, abs=0.005)
  assert sum(account["tokens"] for account in accounts.values()) >= 220 * 8 * 64
  # epochs are those of the documents drawn
  n = len(resolve.resolve("b.jsonl", data_settings(data))[0].documents["train"])
  assert accounts["b.jsonl"]["epochs"] == accounts["b.jsonl"]["documents"] / n > 1


def test_lanes_come_to_the_long_documents_at_different_times(root):
  batch = next(train_iterator(mixture(root, "a:1,b.jsonl:1,c:1", lanes=64), seq_len=768, batch_size=64, seed=0))
  long = batch["targets"] - 3 == ord("b")
  first = long.argmax(axis=1)
  assert 0.25 < long.mean() < 0.4 and np.ptp(first) > 400 and np.std(first) > 100


def test_a_mixture_continues_from_its_position_exactly(root):
  data = mixture(root, "a:1,b.jsonl:2,c:0.5")
  iterator = train_iterator(data, seq_len=48, batch_size=8, seed=1)
  for _ in range(37):
    next(iterator)
  state, expected = iterator.state(), [next(iterator) for _ in range(30)]
  assert len(state) < 4096
  again = train_iterator(data, seq_len=48, batch_size=8, seed=1)
  again.restore(state)
  for batch in expected:
    other = next(again)
    assert all((batch[key] == other[key]).all() for key in batch)
  with pytest.raises(UserError, match="source a was 0.285714286 of .* and is 0.333333333 of"):
    train_iterator(mixture(root, "a:1,b.jsonl:2"), seq_len=48, batch_size=8, seed=1).restore(state)


def test_metrics_and_accounts_of_all_lanes_add_up(root):
  data = mixture(root, "a:1,c:3")
  parts = [train_iterator(data, seq_len=32, batch_size=8, seed=1, rows=rows) for rows in (range(4), range(2, 8))]
  alone = train_iterator(data, seq_len=32, batch_size=8, seed=1)
  for iterator in (*parts, alone):
    for _ in range(10):
      next(iterator)
  metrics = account_metrics([part.tally() for part in parts])
  assert metrics == account_metrics([alone.tally()])
  assert metrics["data/fill"] == 1 and metrics["data/a/target"] == 0.25
  assert metrics["data/a/tokens"] + metrics["data/c/tokens"] >= 10 * 8 * 32
  assert metrics["data/a/share"] == pytest.approx(0.25, abs=0.03)


def test_held_out_text_is_drawn_by_weight_and_by_source(root):
  data = mixture(root, "a:1,b.jsonl:1")
  whole = evaluation_batches(data, seq_len=64, batch_size=2, max_tokens=10**6)
  by_source = evaluation_by_source(data, seq_len=64, batch_size=2, max_tokens=10**6)
  assert list(by_source) == ["a", "b.jsonl"]
  assert sum(each.tokens for each in by_source.values()) == whole.tokens
  assert all(d.startswith(b"a") for d in documents_of(by_source["a"].batches))
  trained = set(documents_of([next(train_iterator(data, seq_len=64, batch_size=512, seed=0))]))
  assert not trained & set(documents_of(whole.batches))
  assert evaluation_by_source(settings(root / "b.jsonl"), seq_len=64, batch_size=2, max_tokens=10**6) == {}


def test_a_mixture_that_is_evaluated_on_gives_what_it_holds_out(root):
  data = settings("", validation="stdlib", root=str(root))
  assert {split for _, split in resolve.validation(data_settings(data))} == {"validation"}
  data.validation = str(root / "b.jsonl")
  assert [split for _, split in resolve.validation(data_settings(data))] == ["all"]
  write(root / "math" / "train.jsonl", [f"{i} + {i}" for i in range(60)])
  data.validation = "gsm8k"
  ((source, split),) = resolve.validation(data_settings(data))
  assert split == "validation" and 0 < len(source.documents[split]) < 30
  data.train, data.validation = str(root / "a"), str(root / "c")  # held-out text is elsewhere: all of it is trained on
  assert [split for _, split in resolve.training(data_settings(data))] == ["all"]
  data.mixture = "a:1,b.jsonl:1"
  assert [split for _, split in resolve.training(data_settings(data))] == ["train", "train"]


def test_all_that_is_missing_is_told_at_once_with_where_to_get_it(root, monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  write(root / "github_code" / "a.jsonl", [f"x = {i}" for i in range(50)], "code")
  write(root / "starcoder_java" / "a.jsonl", [f"int {i};" for i in range(50)], "content")
  data = settings("turbosparse_150b", root=str(root))
  with pytest.raises(UserError, match="13 of 15 sources are missing") as error:
    check_data(data, 259)
  sentence = str(error.value)
  for source in TURBOSPARSE_150B:
    there = source.name in ("github_code", "starcoder_java")
    assert (f"{source.name} (not at {root}/{source.name}" in sentence) != there and (source.get in sentence) != there
  assert "tfds/pg19/0.1.1" in sentence and "allow_missing=true" in sentence and "\n" not in sentence
  data.allow_missing = True
  check_data(data, 259)
  line = describe(data_settings(data))
  assert "starcoder_java 35.32%, github_code 64.68%; missing and left out: pile_academic" in line
  with pytest.raises(UserError, match="which is not set"):
    check_data(settings("turbosparse_150b"), 259)
  data.root = str(root / "nowhere")
  with pytest.raises(UserError, match="15 of 15 sources are missing"):
    check_data(data, 259)


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("a", 'where "name:weight" belongs'),
    ("a:1,", 'where "name:weight" belongs'),
    (":1", 'where "name:weight" belongs'),
    ("a:x", 'where "name:weight" belongs'),
    ("a:nan", 'where "name:weight" belongs'),
    ("a:1,a:2", "names a twice"),
    ("a:1,b.jsonl:-1", "has negative weights .b.jsonl:-1"),
    ("a:0,b.jsonl:0", "add up to 0"),
    ("a:1,d/e:1,f.txt:1", "2 of 3 sources are missing: d/e .* f.txt"),
    ("a:1,stdlob:1", "did you mean 'stdlib'"),
    ("stories_mixture:1,gsm8k:1", "gsm8k"),
  ],
)
def test_a_mixture_that_makes_no_sense_is_one_sentence(root, text, sentence):
  with pytest.raises(UserError, match=sentence) as error:
    check_data(mixture(root, text), 259)
  assert "\n" not in str(error.value)


def test_a_weight_of_zero_draws_nothing(root):
  iterator = train_iterator(mixture(root, "a:1,c:0"), seq_len=32, batch_size=4, seed=0)
  for _ in range(20):
    next(iterator)
  assert [account["tokens"] > 0 for account in accounts_at(iterator.state())] == [True, False]


def test_a_mixture_inside_a_mixture_keeps_its_proportions(root):
  sources = resolve.training(data_settings(mixture(root, "stdlib:1,a:3")))
  assert {source.name: source.weight for source, _ in sources} == {
    "stdlib_docs": 1 / 8,
    "stdlib_code": 1 / 8,
    "a": 0.75,
  }
  assert parse_mixture("C:/x/y.jsonl:2, a:1e-3") == [("C:/x/y.jsonl", 2.0), ("a", 1e-3)]


def test_the_stories_mixture_of_the_test_data(shared_data):
  data = settings("stories_mixture", root=str(shared_data), vocabulary=str(shared_data / "stories260k/tokenizer.model"))
  data.lanes = 8
  check_data(data, 512)
  iterator = train_iterator(data, seq_len=256, batch_size=16, seed=0)
  for _ in range(300):
    next(iterator)
  for account in accounts_at(iterator.state()):
    assert account["share"] == pytest.approx(account["target"], abs=0.05)
  held_out = evaluation_by_source(data, seq_len=256, batch_size=4, max_tokens=20_000)
  assert set(held_out) == {source.name for source in MIXTURES["stories_mixture"]} - {"wikitext"}  # one document


def test_the_document_has_the_declared_sources_in_its_table():
  rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\d.]+) % \| `(\w+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
  assert rows == [(s.name, s.category, f"{s.weight:.2f}", s.field, s.get) for s in TURBOSPARSE_150B]
