import numpy as np
import pytest

from tests.data.conftest import documents_of, settings
from tsparse.data import (
  accounts_at,
  bos_id,
  check_data,
  data_settings,
  evaluation_batches,
  evaluation_by_source,
  load_tokenizer,
  load_vocabulary,
  resolve,
  stdlib,
  train_iterator,
)
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


def test_a_task_registered_by_the_user(jsonl, monkeypatch):
  seqio, tf = load_tensorflow()

  def add(name, feature, texts=("a b", "c d")):
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({feature: list(texts)}),
        splits=["train"],
      ),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={feature: seqio.Feature(seqio.ByteVocabulary())},
    )

  add("mine", "targets")
  add("pairs", "inputs")
  add("empty", "targets", ["", ""])
  try:
    check_data(settings("mine", jsonl), 259)
    batch = next(train_iterator(settings("mine", jsonl, lanes=2), seq_len=8, batch_size=2, seed=0))
    assert sorted(seqio.ByteVocabulary().decode(row[:4].tolist()) for row in batch["targets"]) == ["a b", "c d"]
    monkeypatch.setattr("tsparse.data.streams.EMPTY", 9)
    with pytest.raises(UserError, match="'empty': its shard 0 of 1 gave no token in 9 documents"):
      check_data(settings("empty", jsonl, eos=False), 259)
    with pytest.raises(UserError, match="no split 'validation', only train"):
      check_data(settings("mine"), 259)
    with pytest.raises(UserError, match="has the features inputs"):
      check_data(settings("pairs", jsonl), 259)
  finally:
    seqio.TaskRegistry.remove("mine")
    seqio.TaskRegistry.remove("pairs")
    seqio.TaskRegistry.remove("empty")


def registered(name, examples, features, make=None, **kwargs):
  seqio, tf = load_tensorflow()
  make = make or tf.data.Dataset.from_tensor_slices
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: make({k: np.array([e[k] for e in examples], np.int32) for k in features}),
      splits=["train", "validation"],
    ),
    preprocessors=[],
    output_features={key: seqio.Feature(seqio.ByteVocabulary(), add_eos=False) for key in features},
    **kwargs,
  )


@pytest.fixture
def user_mixture():
  """`talk`, whose second half counts, and `both` of `plain` and `more` at 3:1, registered with seqio."""
  seqio, _ = load_tensorflow()
  talk = [{"targets": [65 + i] * 9 + [1], "loss_mask": [0] * 5 + [1] * 5} for i in range(20)]
  registered("talk", talk, ("targets", "loss_mask"), shuffle_buffer_size=4)
  for name in ("plain", "more"):
    registered(name, [{"targets": [97 + i] * 29 + [1]} for i in range(20)], ("targets",), shuffle_buffer_size=4)
  seqio.MixtureRegistry.add("both", [("plain", 3), ("more", lambda _: 1.0)])
  yield
  for name in ("talk", "plain", "more"):
    seqio.TaskRegistry.remove(name)
  seqio.MixtureRegistry.remove("both")


def test_a_mixture_of_the_user_is_mixed_by_tokens_with_its_masks(user_mixture):
  shares = {source.name: source.weight for source in resolve.resolve("both", data_settings(settings("both")))}
  assert shares == {"plain": 0.75, "more": 0.25}
  data = settings("", mixture="talk:1,plain:3", lanes=4)
  check_data(data, 259)
  iterator = train_iterator(data, seq_len=50, batch_size=8, seed=2)
  batches = [next(iterator) for _ in range(20)]
  talk, plain = accounts_at(iterator.state())
  assert talk["share"] == pytest.approx(0.25, abs=0.02) and plain["target"] == 0.75 and talk["epochs"] is None
  targets, mask = (np.concatenate([b[key].reshape(-1) for b in batches]) for key in ("targets", "loss_mask"))
  assert mask[targets >= 97].all() and set(mask[(targets >= 65) & (targets < 97)]) == {0, 1}
  state, expected = iterator.state(), [next(iterator) for _ in range(10)]
  again = train_iterator(data, seq_len=50, batch_size=8, seed=2)
  again.restore(state)
  assert all((next(again)[key] == batch[key]).all() for batch in expected for key in ("targets",))
  held_out = evaluation_by_source(data, seq_len=50, batch_size=2, max_tokens=200)
  assert sum(b["loss_mask"].sum() for b in held_out["talk"].batches) == held_out["talk"].tokens / 2
  without = evaluation_by_source(
    settings("", mixture="talk:1,plain:3", eos=False), seq_len=50, batch_size=2, max_tokens=200
  )
  assert not any((b["targets"] == 1).any() for b in without["talk"].batches)


def test_a_task_with_fewer_documents_than_lanes_is_refused_in_a_sentence(user_mixture):
  iterator = train_iterator(settings("both", lanes=64), seq_len=50, batch_size=64, seed=2)
  with pytest.raises(UserError, match="shard .* of 64 has no documents; read it by fewer lanes"):
    next(iterator)


def test_a_task_whose_position_cannot_be_saved_is_refused_before_it_is_trained_on():
  seqio, tf = load_tensorflow()

  def generated(arrays):
    signature = {"targets": tf.TensorSpec([None], tf.int32)}
    return tf.data.Dataset.from_generator(lambda: iter([{"targets": [65, 1]}] * 9), output_signature=signature)

  registered("generated", [], ("targets",), generated)
  try:
    with pytest.raises(UserError, match="'generated': its position cannot be saved .*GeneratorDataset"):
      check_data(settings("generated"), 259)
  finally:
    seqio.TaskRegistry.remove("generated")


def test_our_sources_are_seqio_tasks_with_the_same_documents(jsonl, tmp_path):
  (tmp_path / "b.txt").write_text("naïve text")
  data = data_settings(settings("", mixture=f"{jsonl}:3,{tmp_path}/b.txt:1"))
  mixture = resolve.seqio_provider("stdlib_docs", data_settings(settings("stdlib_docs")))
  assert mixture.output_features["targets"].dtype.as_numpy_dtype == np.int32
  (source, split), _ = resolve.training(data)
  task = resolve.seqio_task(source, "bytes")
  theirs = sorted(example["targets"].tolist() for example in task.get_dataset(None, split, False).as_numpy_iterator())
  documents = source.documents[split]
  ours = sorted([*load_tokenizer("bytes").encode(documents.read(i).decode()), 1] for i in range(len(documents)))
  assert theirs == ours


def test_a_dataset_of_tfds_is_read_where_there_are_no_files(tmp_path, monkeypatch):
  _, tf = load_tensorflow()
  import tensorflow_datasets as tfds

  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setenv("TSPARSE_CACHE", str(tmp_path / "cache"))
  texts = {s: [f"{s} {i} " + "z" * i for i in range(30)] for s in ("train", "validation")}
  tfds.dataset_builders.store_as_tfds_dataset(
    name="pg19",
    version="0.1.1",
    data_dir=str(tmp_path),
    features=tfds.features.FeaturesDict({"book_text": tfds.features.Text()}),
    split_datasets={s: tf.data.Dataset.from_tensor_slices({"book_text": texts[s]}) for s in texts},
  )
  data = settings("pile_pg19")
  check_data(data, 259)
  batch = next(train_iterator(data, seq_len=700, batch_size=2, seed=0))
  assert {d.decode() for d in documents_of([batch])} <= set(texts["train"])
  assert len(list((tmp_path / "cache").glob("*.texts"))) == 2
  assert evaluation_batches(data, seq_len=64, batch_size=2, max_tokens=10**5).documents == 30
