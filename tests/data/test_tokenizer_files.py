"""A workdir alone is enough: the tokenizer's files in it, and what reads them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from configs import repeat, tiny_drelu
from tests import test_experiment
from tests.convert.test_huggingface import CASES, save_huggingface
from tests.data.test_vocabulary import byte_level, published_json, write
from tests.test_experiment import quiet, small
from tsparse import experiment
from tsparse import workdir as workdirs
from tsparse.check import check
from tsparse.convert.convert import convert
from tsparse.convert.huggingface import copy_tokenizer
from tsparse.convert.model import open_model
from tsparse.data.encoding import load_tokenizer, tokenizer_digest
from tsparse.data.tokenizer_files import copy_files, keep, kept, vocabulary_of
from tsparse.errors import UserError

text = test_experiment.text  # the fixture


@pytest.fixture
def original(tmp_path):
  """A tokenizer's folder with what may lie in one: weights, a link, config.json with its EOS."""
  folder = tmp_path / "original"
  write(folder, tokenizer=byte_level("<e>"), tokenizer_config={"pad_token": "<p>"}, added_tokens={"<p>": 301})
  write(folder, config={"eos_token_id": 300, "model_type": "llama"}, generation_config={"eos_token_id": [299, 300]})
  (folder / "model.safetensors").write_bytes(bytes(100))
  (folder / "special_tokens_map.json").symlink_to(tmp_path / "elsewhere.json")
  (tmp_path / "elsewhere.json").write_text("{}")
  return folder


def test_a_run_is_resumed_and_repeated_without_the_tokenizer_it_was_started_with(original, text, tmp_path, monkeypatch):
  for name, value in (("analyze_stages", {}), ("write_report", None), ("print_table", None)):
    monkeypatch.setattr(experiment, name, lambda *_, value=value: value)
  config = small(text, tiny_drelu)
  config.model.update({"vocab_size": 302, "num_layers": 1})
  config.data.vocabulary, config.train.checkpoint_every, config.train.steps = str(original), 2, 4
  workdir, digest = tmp_path / "run", tokenizer_digest(str(original))

  def losses():
    experiment.run(config, workdir, quiet())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}

  before = losses()
  assert open_model(workdir).vocabulary == str(original)
  shutil.rmtree(original)
  assert tokenizer_digest(open_model(workdir).vocabulary) == digest
  shutil.rmtree(workdir / "checkpoints" / "4")  # the last steps are trained again
  assert losses() == before and (workdir / "checkpoints" / "4").exists()
  assert json.loads((workdir / "config.json").read_text())["data"]["vocabulary"] == str(original)
  again = repeat.get_config(str(workdir))
  check(again)
  assert again.data.vocabulary == str(workdir / "tokenizer")
  workdirs.check_free(workdir, again)  # another path of the same tokenizer is no other config
  copy = convert(workdir, tmp_path / "hf", "hf")
  assert load_tokenizer(copy.vocabulary).table == load_tokenizer(str(workdir / "tokenizer")).table
  stages = [workdir, workdir / "base", workdir / "phases" / "more"]
  for stage in stages[1:]:
    with workdirs.claim(stage, config, workdir):
      assert tokenizer_digest(str(stage / "tokenizer")) == digest
  assert len({(stage / "tokenizer" / "tokenizer.json").stat().st_ino for stage in stages}) == 1  # one copy, linked


def test_the_tokenizer_that_was_recorded_wins(original, tmp_path, caplog):
  keep(str(original), tmp_path)
  copy = str(tmp_path / "tokenizer")
  assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json",
  }  # fmt: skip
  assert not any(path.is_symlink() for path in (tmp_path / "tokenizer").iterdir())
  assert tokenizer_digest(copy) == tokenizer_digest(str(original))
  assert vocabulary_of(tmp_path, str(original)) == str(original) and not caplog.records
  write(original, tokenizer=byte_level("<f>"))
  assert vocabulary_of(tmp_path, str(original)) == vocabulary_of(tmp_path, str(original)) == copy
  assert [f"{original} has changed since" in record.getMessage() for record in caplog.records] == [True]
  with pytest.raises(UserError, match="holds another tokenizer than config.data.vocabulary"):
    keep(str(original), tmp_path)
  assert kept("bytes", tmp_path) is None and vocabulary_of(tmp_path / "none", "x.model") == "x.model"


def test_a_sentencepiece_model_of_any_name_stays_the_one_that_was_named(mistral, tmp_path):
  beside = tmp_path / "beside"
  write(beside, tokenizer=byte_level("<e>"), tokenizer_config={"eos_token": "<e>"})
  (beside / "odd name.model").symlink_to(mistral)
  named = str(beside / "odd name.model")
  (beside / "tokenizer_config.json").unlink()
  keep(named, tmp_path)
  assert tokenizer_digest(kept(named, tmp_path)) == tokenizer_digest(named) != tokenizer_digest(str(beside / "x"[:0]))
  (tmp_path / "more").mkdir()
  keep(named, tmp_path / "more", tmp_path)
  assert os.stat(kept(named, tmp_path / "more")).st_nlink == 2


def test_an_export_without_its_tokenizer_says_so_and_takes_another(tmp_path, mistral, capsys):
  source = tmp_path / "source"
  save_huggingface(source, *CASES["llama"])
  convert(source, tmp_path / "without", "hf", console=Console())
  assert "is written without a tokenizer; name one by --tokenizer" in " ".join(capsys.readouterr().out.split())
  with pytest.raises(UserError, match="a GGUF needs a tokenizer; name one by --tokenizer"):
    convert(source, tmp_path / "gguf", "gguf")
  with pytest.raises(UserError, match="has 32000 ids and the model embeds 97"):
    convert(source, tmp_path / "with", "hf", tokenizer=mistral)
  save_huggingface(tmp_path / "large", "Llama", {"vocab_size": 32000})
  for form in ("hf", "tsparse"):
    model = convert(tmp_path / "large", tmp_path / form, form, tokenizer=mistral)
    assert load_tokenizer(model.vocabulary).table == load_tokenizer(mistral).table


def test_a_tokenizer_json_that_says_the_same_goes_along(mistral, tmp_path):
  same, other = tmp_path / "same", tmp_path / "other"
  for folder, made in ((same, published_json(Path(mistral))), (other, byte_level("</s>"))):
    write(folder, tokenizer=made)
    shutil.copy(mistral, folder / "tokenizer.model")
    (folder / "out").mkdir()
    write(folder, tokenizer_config={"eos_token": "</s>"})
  for folder in (same, other):
    copy_tokenizer(str(folder / "tokenizer.model"), folder / "out")
    assert load_tokenizer(str(folder / "out")).table == load_tokenizer(mistral).table
  assert (same / "out" / "tokenizer.json").exists() and not (other / "out" / "tokenizer.json").exists()
  copy_files(str(same), tmp_path)
  assert (tmp_path / "tokenizer.json").exists()
