import pytest

from tests.data.conftest import documents_of, settings
from tsparse.data import bos_id, check_data, load_vocabulary, stdlib, train_iterator
from tsparse.data.tensorflow import load_tensorflow
from tsparse.errors import UserError


@pytest.fixture
def small_library(tmp_path, monkeypatch):
  """The stdlib tasks, of a library of 60 small modules."""
  (tmp_path / "lib").mkdir()
  for i in range(60):
    (tmp_path / f"lib/m{i}.py").write_text(f'"""The module of the number {"one " * i}."""\nx = {i}\n')
  monkeypatch.setenv("TSPARSE_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(stdlib, "library", lambda: tmp_path / "lib")


@pytest.mark.parametrize("name", ["stdlib", "stdlib_docs", "stdlib_code"])
def test_stdlib_tasks_give_text(small_library, name):
  data = settings(name)
  check_data(data, 259)
  batch = next(train_iterator(data, seq_len=512, batch_size=64, seed=0))
  documents = documents_of([batch])
  assert all(b"The module" in d for d in documents)
  code = [d for d in documents if b"x = " in d]
  share = sum(len(d) + 1 for d in code) / batch["targets"].size
  assert share == pytest.approx({"stdlib": 0.5, "stdlib_docs": 0.0, "stdlib_code": 1.0}[name], abs=0.02)


def test_an_unknown_name_is_answered_with_the_nearest(small_library):
  with pytest.raises(UserError, match="'stdlib_dosc'.*did you mean 'stdlib_docs'"):
    check_data(settings("stdlib_dosc"), 259)


def test_a_vocabulary_that_cannot_be_is_an_error(tmp_path):
  with pytest.raises(UserError, match="No such file"):
    load_vocabulary("byte")
  (tmp_path / "x.model").write_text("no model")
  with pytest.raises(UserError, match="not a SentencePiece model"):
    load_vocabulary(str(tmp_path / "x.model"))


def test_bytes_begin_with_the_pad_id():
  assert bos_id(load_vocabulary("bytes")) == 0


def test_too_few_documents_to_hold_out_any(tmp_path):
  (tmp_path / "one.txt").write_text("one document")
  with pytest.raises(UserError, match="set data.validation"):
    check_data(settings(tmp_path / "one.txt"), 259)


def test_a_task_registered_by_the_user(jsonl):
  seqio, tf = load_tensorflow()

  def add(name, feature):
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({feature: ["a b", "c d"]}),
        splits=["train"],
      ),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={feature: seqio.Feature(seqio.ByteVocabulary())},
    )

  add("mine", "targets")
  add("pairs", "inputs")
  try:
    check_data(settings("mine", jsonl), 259)
    batch = next(train_iterator(settings("mine", jsonl, lanes=2), seq_len=8, batch_size=2, seed=0))
    assert sorted(seqio.ByteVocabulary().decode(row[:4].tolist()) for row in batch["targets"]) == ["a b", "c d"]
    with pytest.raises(UserError, match="no split 'validation', only train"):
      check_data(settings("mine"), 259)
    with pytest.raises(UserError, match="has the features inputs"):
      check_data(settings("pairs", jsonl), 259)
  finally:
    seqio.TaskRegistry.remove("mine")
    seqio.TaskRegistry.remove("pairs")
