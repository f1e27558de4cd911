"""Exports as transformers reads them: AutoTokenizer, with no code of theirs, has our ids."""

import io
import os
import shutil
import stat

import pytest
import transformers

from tests.convert.test_huggingface import save_huggingface
from tests.data.test_vocabulary import CHATML, ODD, SPELLED, byte_level, write
from tsparse.convert.convert import convert
from tsparse.data.encoding import load_tokenizer, same_tokenizer

STORIES = ("Once upon a time, there was a little girl.\nShe liked  to play.", "one <s>two</s> three", " a")


@pytest.mark.parametrize("activation", ["swiglu", "drelu"])  # a class of transformers', and one that we bring along
@pytest.mark.parametrize("kind", ["sentencepiece", "json", "json_alone"])
def test_auto_tokenizer_loads_an_export_with_our_ids(kind, activation, shared_data, tmp_path, monkeypatch):
  source, tokenizer = tmp_path / "source", byte_level("<e>", "<|im_start|>", "<|im_end|>")
  size = 512 if kind == "sentencepiece" else tokenizer.get_vocab_size()
  ids = {"bos_token_id": 1, "eos_token_id": tokenizer.token_to_id("<e>")} if kind == "json_alone" else {}
  save_huggingface(source, "Llama", {"vocab_size": size, **ids})
  if kind == "sentencepiece":
    shutil.copy(shared_data / "stories260k" / "tokenizer.model", source)
  else:
    write(source, tokenizer=tokenizer, **({} if ids else {"tokenizer_config": {"eos_token": "<e>"}}))
  model = convert(source, tmp_path / "out", "hf", activation=activation)
  monkeypatch.setattr("sys.stdin", io.StringIO())  # nobody is there to allow that code is run
  theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(model.vocabulary)
  texts = [*ODD, *SPELLED, CHATML, *STORIES]
  assert [theirs.encode(text, add_special_tokens=False) for text in texts] == list(map(list, ours.encode_all(texts)))
  assert theirs.eos_token_id == ours.eos and len(theirs) == len(ours.table)
  assert (theirs.encode("a")[0] == ours.bos) == ours.adds_bos
  assert same_tokenizer(ours, load_tokenizer(str(source)))


def test_files_of_an_export_have_the_permissions_of_the_umask(tmp_path):
  save_huggingface(tmp_path / "source", "Llama", {"vocab_size": 97})
  before = os.umask(0o027)
  try:
    for form in ("hf", "tsparse"):
      convert(tmp_path / "source", tmp_path / form, form)
  finally:
    os.umask(before)
  written = [path for form in ("hf", "tsparse") for path in (tmp_path / form).rglob("*")]
  modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
  assert {path.name for path, mode in modes.items() if path.is_file() and mode != 0o640} == set()
  assert {path.name for path, mode in modes.items() if path.is_dir() and mode != 0o750} == set()
