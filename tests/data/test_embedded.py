"""Tokens beyond the rows of a model's embedding, and rows without a token: the same everywhere."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

from tests.convert.test_huggingface import save_huggingface
from tests.data.conftest import settings
from tests.data.test_vocabulary import byte_level, write
from tsparse.analysis.run import _texts
from tsparse.convert.convert import convert
from tsparse.convert.gguf_vocabulary import read_vocabulary
from tsparse.convert.model import open_model
from tsparse.data import check_data, data_settings, evaluation_batches, train_iterator
from tsparse.data import embedded as embedded_module
from tsparse.data.embedded import check_embedded, without_token
from tsparse.data.encoding import BYTES, load_tokenizer
from tsparse.errors import UserError
from tsparse.evaluate.harness import Harness
from tsparse.sparse.generate import Request, complete, load
from tsparse.sparse.sample import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model with as many rows as its tokenizer has ids, but for the `[PAD]` of added_tokens.json."""
  folder = tmp_path_factory.mktemp("model")
  tokenizer = byte_level("<e>")
  rows = tokenizer.get_vocab_size()
  write(folder, tokenizer=tokenizer, tokenizer_config={"eos_token": "<e>"}, added_tokens={"[PAD]": rows})
  save_huggingface(folder, "Llama", {"vocab_size": rows})
  return folder


@pytest.fixture
def model(folder):
  embedded_module._warn.cache_clear()
  return open_model(folder)


def text_of(folder, text):
  (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{text} {i} times"}) for i in range(200)))
  return folder / "text.jsonl"


def test_a_token_beyond_the_embedding_is_warned_of_once_and_hinders_nothing(model, tmp_path, caplog):
  rows, vocabulary = model.config.vocab_size, model.vocabulary
  check_data(settings(text_of(tmp_path, "some text"), vocabulary=vocabulary), rows)
  plain = dataclasses.replace(data_settings(settings(tmp_path / "text.jsonl")), train="")
  sizes = {"seq_len": 16, "batch_size": 2, "max_tokens": 500}
  ((text, _),) = _texts([model], dataclasses.replace(plain, validation=str(tmp_path / "text.jsonl")), "", **sizes)
  assert text.tokens and load(model.path).unused is None
  assert len(read_vocabulary(vocabulary, rows).tokens) == rows
  for form in ("tsparse", "hf", "gguf"):
    convert(model.path, tmp_path / form, form)
  named = [record.getMessage() for record in caplog.records if f"'[PAD]' ({rows})" in record.getMessage()]
  assert len({*named}) == len(named) and sum(str(model.path) in line for line in named) == 1


def test_text_that_needs_such_a_token_is_refused_and_never_gathered(model, tmp_path):
  rows, refused = model.config.vocab_size, pytest.raises(UserError, match=r"needs the token '\[PAD\]', id \d+")
  data = settings(text_of(tmp_path, "a [PAD]"), vocabulary=model.vocabulary)
  data = data_settings(data, embedded=rows)
  with refused:
    next(train_iterator(data, seq_len=16, batch_size=8, seed=0))
  with refused:
    evaluation_batches(data, seq_len=16, batch_size=2, max_tokens=500)
  with refused:
    complete(load(model.path), ["a [PAD]"], Request(1))
  tokenizer = load_tokenizer(model.vocabulary)
  harness = Harness(lambda _: model, tokenizer, None, embedded=rows, max_length=16, batch_size=2, bos=False)
  assert harness.tok_encode("a") == tokenizer.encode("a")
  with refused:
    harness.tok_encode("a [PAD]")


def test_a_tokenizer_whose_own_ids_are_beyond_is_another_models():
  with pytest.raises(UserError, match="has 259 ids and the model embeds 97"):
    check_embedded(BYTES, 97)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_rows_without_a_token_are_kept_and_never_generated(temperature, folder, tmp_path):
  tokenizer = byte_level("<e>", "<f>")
  tokens = tokenizer.get_vocab_size()
  write(tmp_path / "m", tokenizer=tokenizer, tokenizer_config={"eos_token": "<e>"})
  theirs = save_huggingface(tmp_path / "m", "Llama", {"vocab_size": tokens + 40})
  weight = theirs.lm_head.weight.data
  weight[tokens:] = 4 * weight[:40]  # by themselves they would be chosen most of the time
  theirs.save_pretrained(tmp_path / "m")
  decoder = load(tmp_path / "m")
  assert decoder.config.vocab_size == tokens + 40 and decoder.unused.sum() == 40 and decoder.unused[tokens:].all()
  sampling = Sampling(temperature=temperature, top_k=200)
  (done,) = complete(decoder, ["the cat"], Request(40, sampling))
  assert max(done.tokens) < tokens
  open_by_them = dataclasses.replace(decoder, unused=None)
  assert max(complete(open_by_them, ["the cat"], Request(40, sampling))[0].tokens) >= tokens  # the test sees the fault
  convert(tmp_path / "m", tmp_path / "out", "hf")
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  np.testing.assert_array_equal(again.lm_head.weight.detach(), theirs.lm_head.weight.detach())


def test_the_ids_of_bytes_all_have_a_token():
  assert without_token(BYTES, 259) is None and without_token(BYTES, 300).nonzero()[0].tolist() == [*range(259, 300)]
