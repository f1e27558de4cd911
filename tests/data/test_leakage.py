"""Held-out documents that are trained on too."""

import dataclasses
import gzip
import json
import zlib
from hashlib import blake2b

import pytest

from tests.data.conftest import settings
from tsparse.data import check_data, check_disjoint, data_settings, evaluation_batches, leakage, train_iterator
from tsparse.errors import UserError

TEXTS = [f"text {i} " + "t" * (i % 30) for i in range(400)]


def write(path, texts):
  lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
  path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
  return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("TSPARSE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_a_share_of_the_held_out_documents_that_is_trained_on_is_an_error(name, tmp_path):
  held_out = write(tmp_path / "held_out.jsonl", [*TEXTS[:99], "another text"])  # 99 of 100
  data = settings(write(tmp_path / name, TEXTS), held_out)
  sentence = rf"99 of 100 held-out documents \(99.00%\) .* trained on too, .* such as 'text \d+ .*{name}; .* 1.00%"
  for function in (
    lambda: check_data(data, 259),
    lambda: train_iterator(data, seq_len=8, batch_size=1, seed=0),
    lambda: evaluation_batches(data, seq_len=8, batch_size=1, max_tokens=9),
  ):
    with pytest.raises(UserError, match=sentence):
      function()
  data.allow_overlap = 0.99
  assert check_disjoint(data_settings(data)).fraction == 0.99
  data.allow_overlap = 1.5
  with pytest.raises(UserError, match="from 0 to 1"):
    check_data(data, 259)


def test_one_in_a_hundred_is_said_and_allowed(tmp_path):
  held_out = write(tmp_path / "held_out.jsonl", [TEXTS[7], *(f"other {i}" for i in range(99))])
  found = check_disjoint(data_settings(settings(write(tmp_path / "train.jsonl", 2 * TEXTS), held_out)))
  assert (found.shared, found.held_out, found.fraction) == (1, 100, 0.01)
  assert found.sentence.startswith("1 of 100 held-out documents (1.00%) are trained on too, such as 'text 7 ttt")
  assert json.loads(json.dumps(found.facts()))["sentence"] == found.sentence
  whole = dataclasses.replace(data_settings(settings(tmp_path / "train.jsonl")), validation="")
  assert check_disjoint(whole).shared == 0  # the held-out split of the same file
  assert check_disjoint(dataclasses.replace(whole, train="", validation=str(held_out))) is None


def test_documents_of_one_crc32_are_told_apart(tmp_path):
  texts = {}
  for i in range(10**6):
    text = blake2b(b"%d" % i, digest_size=8).hexdigest()
    if (other := texts.setdefault(zlib.crc32(text.encode()), text)) != text:
      break
  assert other != text and zlib.crc32(other.encode()) == zlib.crc32(text.encode())
  held_out = write(tmp_path / "held_out.jsonl", [text, "x"])
  train = write(tmp_path / "train.jsonl", [other] * 9 + TEXTS)
  data = data_settings(settings(train, held_out))
  assert leakage.leakage(data).shared == 0
  write(tmp_path / "train.jsonl", [other] * 3 + [text, *TEXTS])
  assert leakage.leakage(data).shared == 1


def test_sources_of_a_mixture_are_compared_with_each_other(tmp_path, monkeypatch):
  write(tmp_path / "a.jsonl", TEXTS)
  write(tmp_path / "b.jsonl", TEXTS[:200])
  mixture = data_settings(settings("", mixture="a.jsonl:1,b.jsonl:1", root=str(tmp_path)))
  assert check_disjoint(mixture).shared == 0  # copies are held out in both
  chat = [{"instruction": text, "output": "said"} for text in TEXTS]
  (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
  talk = settings(f"chat:{tmp_path}/chat.jsonl", f"chat:{tmp_path}/chat.jsonl")
  with pytest.raises(UserError, match="400 of 400"):
    check_disjoint(data_settings(talk))
  talk.validation = str(tmp_path / "a.jsonl")
  assert check_disjoint(data_settings(talk)).shared == 0
  # what another stage trains on
  with pytest.raises(UserError, match="are trained on too"):
    check_disjoint(mixture, data_settings(settings(tmp_path / "a.jsonl", tmp_path / "chat.jsonl")))


def test_seqio_tasks_are_unknown(tmp_path, monkeypatch):
  path = write(tmp_path / "a.jsonl", TEXTS)
  task = leakage.held_out(data_settings(settings("", path)))[0][0]
  monkeypatch.setattr(leakage, "training", lambda _: [(dataclasses.replace(task, name="t", documents={}), "train")])
  found = check_disjoint(data_settings(settings("t", path)))
  assert found.unknown == ("t",) and found.sentence.endswith("; the documents of t cannot be compared")
