"""config.data.cached: the tokens that seqio's cache job wrote are those of the text."""

import collections
import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tests.data.conftest import documents_of, settings
from tsparse.data import accounts_at, check_data, train_iterator
from tsparse.data.resolve import seqio_provider
from tsparse.data.settings import data_settings
from tsparse.data.tensorflow import load_tensorflow
from tsparse.errors import UserError

BEAM_PYTHON = os.environ.get("TSPARSE_BEAM_PYTHON", sys.executable)  # of the environment of requirements-beam.txt


def write_as_the_job_does(task, folder, shards=8):
  """seqio's layout, without Beam."""
  seqio, tf = load_tensorflow()
  out = folder / seqio.get_task_dir_from_name(task.name)
  out.mkdir(parents=True)
  for split in task.splits:
    examples = list(task.preprocess_precache(task.source.get_dataset(split, shuffle=False)).as_numpy_iterator())
    for number in range(shards):
      path = f"{seqio.get_cached_tfrecord_prefix(str(out), split)}-{number:05}-of-{shards:05}"
      with tf.io.TFRecordWriter(path) as writer:
        for example in examples[number::shards]:
          writer.write(seqio.dict_to_tfexample(example).SerializeToString())
    features = {key: {"shape": [None], "dtype": "int32"} for key in examples[0]}
    info = {"num_shards": shards, "features": features, "seqio_version": seqio.__version__}
    (out / f"info.{split}.json").write_text(json.dumps(info))
    (out / f"stats.{split}.json").write_text(json.dumps({"examples": len(examples)}))
  (out / "COMPLETED").write_text("")


def run_the_job(name, folder, tmp_path):
  module = "from tsparse.data.resolve import seqio_provider\nfrom tsparse.data.settings import DataSettings\n"
  (tmp_path / "my_data.py").write_text(f"{module}seqio_provider({name!r}, DataSettings())\n")
  command = [BEAM_PYTHON, "-c", "from seqio.scripts.cache_tasks_main import console_entry_point as run; run()"]
  arguments = ["--tasks=tsparse.*", "--module_import=my_data", f"--output_cache_dir={folder}", "--min_shards=8"]
  environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
  done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]


def epoch(data, documents):
  """How often each of so many documents, the first that are drawn, came."""
  batches = train_iterator(data, seq_len=64, batch_size=4, seed=0)
  drawn = []
  while not drawn or len(documents_of(drawn)) < 3 * documents:
    drawn.append(next(batches))
  return set(documents_of(drawn)), batches


@pytest.mark.parametrize("writer", ["here", "beam"])
def test_cached_and_uncached_give_the_same_examples(writer, jsonl, tmp_path):
  plain, folder = settings(jsonl, lanes=1), tmp_path / "cached"
  task = seqio_provider(jsonl, data_settings(plain))
  if writer == "beam":
    if subprocess.run([BEAM_PYTHON, "-c", "import apache_beam"], capture_output=True).returncode:
      pytest.skip("Apache Beam is not installed: requirements-beam.txt, and TSPARSE_BEAM_PYTHON for its Python")
    run_the_job(jsonl, folder, tmp_path)
  else:
    write_as_the_job_does(task, folder)
  cached = settings(jsonl, lanes=1, cached=str(folder))
  check_data(cached, 264)
  from tsparse.data import tasks

  tasks.check_cached(task, str(folder))

  def examples(split, use_cached):
    found = task.get_dataset(None, split, use_cached=use_cached, shuffle=use_cached, try_in_mem_cache=False)
    return collections.Counter(example["targets"].tobytes() for example in found.as_numpy_iterator())

  for split in task.splits:
    assert examples(split, True) == examples(split, False) and examples(split, True).total() > 0
  fresh, _ = epoch(plain, 57)
  tokens, batches = epoch(cached, 57)
  assert tokens == fresh

  position = batches.state()
  ahead = [next(batches)["targets"].tolist() for _ in range(3)]
  again = train_iterator(cached, seq_len=64, batch_size=4, seed=0)
  again.restore(position)
  assert [next(again)["targets"].tolist() for _ in range(3)] == ahead
  with pytest.raises(UserError, match="data.cached was None and is True"):
    again.restore(train_iterator(plain, seq_len=64, batch_size=4, seed=0).state())
  with pytest.raises(UserError, match="data.cached was True and is None"):
    train_iterator(plain, seq_len=64, batch_size=4, seed=0).restore(position)


def test_lanes_share_a_cache_of_fewer_documents_than_lanes(tmp_path):
  text, held_out = tmp_path / "few.jsonl", tmp_path / "held_out.jsonl"
  text.write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(5)))
  held_out.write_text('{"text": "another"}\n')
  write_as_the_job_does(seqio_provider(str(text), data_settings(settings(text, held_out))), tmp_path / "cached")
  config = settings(text, held_out, lanes=8, cached=str(tmp_path / "cached"))
  check_data(config, 264)
  batches = list(itertools.islice(train_iterator(config, seq_len=32, batch_size=8, seed=0), 6))
  drawn = collections.Counter()
  for row in range(8):  # of a lane each
    drawn.update(documents_of([{key: rows[row] for key, rows in batch.items()} for batch in batches]))
  assert sorted(drawn) == [f"number {i}".encode() for i in range(5)]
  assert max(drawn.values()) - min(drawn.values()) <= 8


def test_a_long_cached_document_leaves_the_other_sources_their_share(tmp_path):
  """It comes in pieces of 8192 tokens, as from a file, and its position among them is kept."""
  for name, texts in {"long": ["word " * 20_000], "short": [f"number {i}" for i in range(200)]}.items():
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = seqio_provider(str(tmp_path / f"{name}.jsonl"), data_settings(settings("")))
    write_as_the_job_does(task, tmp_path / "cached")
  (tmp_path / "held_out.jsonl").write_text('{"text": "another"}\n')
  config = settings("", tmp_path / "held_out.jsonl", lanes=2, cached=str(tmp_path / "cached"))
  config.mixture = f"{tmp_path}/long.jsonl:1,{tmp_path}/short.jsonl:1"
  iterator = train_iterator(config, seq_len=256, batch_size=4, seed=0)
  batches = list(itertools.islice(iterator, 60))  # 61,440 tokens; the document has 100,001
  long, short = (account["share"] for account in accounts_at(iterator.state()))
  assert abs(long - short) < 2 * 8192 / 61_440
  letters = b"".join(documents_of([{key: x[:2] for key, x in batch.items()} for batch in batches]))
  assert 2_000 < letters.count(b"word ") < 4_000
  again = train_iterator(config, seq_len=256, batch_size=4, seed=0)
  again.restore(iterator.state())
  assert [next(again)["targets"].tolist() for _ in range(9)] == [next(iterator)["targets"].tolist() for _ in range(9)]


def test_a_cache_of_other_text_is_not_read(jsonl, tmp_path):
  write_as_the_job_does(seqio_provider(jsonl, data_settings(settings(jsonl))), tmp_path / "cached")
  with open(jsonl, "a") as f:
    f.write('{"text": "one more"}\n')
  with pytest.raises(UserError, match="are not in config.data.cached .* let seqio_cache_tasks write them"):
    check_data(settings(jsonl, cached=str(tmp_path / "cached")), 264)
