"""A flipped bit is noticed, or harmless, in every kind of file that we write and read again."""

import dataclasses
import gzip
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsparse import checksums
from tsparse.convert.convert import convert
from tsparse.convert.model import open_model
from tsparse.data import sources, stdlib
from tsparse.data.sources import read_documents
from tsparse.errors import UserError
from tsparse.models.config import PRESETS
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.sparse.predictors import stored as predictors
from tsparse.train import checkpoint, damage, resume
from tsparse.train.step import TrainState

MODEL = dataclasses.replace(
  PRESETS["tiny"], num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, activation="drelu"
)


def flip(path, rng):
  """Flips one bit of a file, at random."""
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
  path.write_bytes(data)


def cut(path, rng):
  path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def files_under(folder):
  return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def harmed(folder, names, copy, times):
  """Copies of a folder in which one of `names` in turn has a flipped bit, or is cut every fourth time."""
  rng = np.random.default_rng(0)
  order = rng.permutation(len(names))
  for i in range(times):
    shutil.copytree(folder, copy)
    name = names[order[i % len(names)]]
    (cut if i % 4 == 3 else flip)(copy / name, rng)
    yield name
    shutil.rmtree(copy)


def targets(state):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return checkpoint.abstract(jax.eval_shape(lambda: state), jax.tree.map(lambda _: sharding, state))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with checkpoints of steps 6 and 8 -> (workdir, what 8 holds)."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  rng = np.random.default_rng(0)
  shapes, _ = abstract_parameters(Transformer(MODEL))
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
  state = TrainState(step=jnp.asarray(8), params=params, opt_state={"mu": params})
  with checkpoint.manager(workdir, keep=2) as checkpoints:
    checkpoint.save(checkpoints, state.replace(step=jnp.asarray(6)), b"six", 6)
    checkpoint.save(checkpoints, state, b"eight", 8)
  fields = dataclasses.asdict(MODEL)
  config = {"activation": fields.pop("activation"), "model": fields, "data": {"vocabulary": "bytes"}}
  (workdir / "config.json").write_text(json.dumps(config))
  return workdir, state


def same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def parameters_of(model):
  leaves, _ = model.leaves()
  return {name: np.stack([leaf.at(i) for i in leaf.indices]) for name, leaf in leaves.items()}


def test_checksums_are_those_of_the_published_algorithm(tmp_path):
  (tmp_path / "empty").touch()
  (tmp_path / "long").write_bytes(bytes(range(256)) * 40_000)  # of several blocks
  assert checksums.checksum(tmp_path / "empty") == (0, "99aa06d3014798d86001c324468d497f")
  whole = checksums.xxhash.xxh3_128_hexdigest((tmp_path / "long").read_bytes())
  assert checksums.checksum(tmp_path / "long") == (10_240_000, whole)


def test_no_flip_or_cut_of_a_checkpoint_changes_what_training_goes_on_with(run, tmp_path):
  workdir, state = run
  step, copy = workdir / "checkpoints" / "8", tmp_path / "run"
  names, noticed = [name.relative_to("checkpoints/8") for name in files_under(workdir) if "8" in name.parts], []
  for name in harmed(workdir, [step.relative_to(workdir) / name for name in names], copy, len(names)):
    warnings = []
    found = resume.restore_newest(copy, targets(state), warnings.append)
    if found.step == 8:
      same(found.state, state)
      assert found.position == b"eight" and not warnings
    else:
      assert found.step == 6 and "step 8" in warnings[0]
      assert str(name.relative_to("checkpoints/8")) in warnings[0] or "checksums.json" in str(name)
      noticed.append(name)
  # all but the two notes of Orbax's that nobody needs, and a space of checksums.json
  assert len(noticed) >= len(names) - 3


def test_no_flip_of_a_checkpoint_changes_what_is_read_leaf_by_leaf_and_the_optimizer_is_not_read_for_it(run, tmp_path):
  workdir, state = run
  names = [name for name in files_under(workdir) if name.parts[:2] == ("checkpoints", "8")]
  params = [name for name in names if name.parts[2] == "params"]
  right, copy = parameters_of(open_model(workdir)), tmp_path / "run"
  for name in harmed(workdir, params, copy, len(params)):
    for read in (parameters_of, lambda model: model.restore(targets(state).params)):
      with pytest.raises(damage.Torn, match=f"step 8 of .* is torn .*{name.name}"):
        read(open_model(copy))
  for _ in harmed(workdir, [name for name in names if name.parts[2] == "optimizer"], copy, 3):
    same(parameters_of(open_model(copy)), right)


def test_a_checkpoint_without_checksums_is_taken_and_said_not_to_be_verified(run, tmp_path, caplog):
  workdir, state = run
  copy = shutil.copytree(workdir, tmp_path / "run")
  (copy / "checkpoints" / "8" / "checksums.json").unlink()
  assert resume.restore_newest(copy, targets(state), pytest.fail).step == 8
  same(open_model(copy).restore(targets(state).params)[0], state.params)
  assert caplog.text.count("checkpoints/8 has no checksums") == 1 and "cannot be verified" in caplog.text


def test_a_save_that_ends_before_its_checksums_leaves_no_checkpoint(run, tmp_path, monkeypatch):
  """They are written before the folder gets its name, so a kill in between cannot be seen by a reader."""
  state = run[1]

  def killed(folder, names):
    assert folder.name.startswith("8.") and len(list(names)) > 9
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checksums, "write", killed)
  with pytest.raises(OSError, match="No space left"), checkpoint.manager(tmp_path, keep=2) as checkpoints:
    checkpoint.save(checkpoints, state, b"", 8)
  assert not (tmp_path / "checkpoints" / "8").exists() and resume.finished(tmp_path) == []


@pytest.mark.parametrize("format", ["hf", "tsparse"])
def test_no_flip_of_converted_weights_changes_them_and_the_config_may_be_edited(format, run, tmp_path):
  out, copy = tmp_path / "out", tmp_path / "copy"
  right = parameters_of(convert(run[0], out, format=format))
  sums = next(out.rglob("checksums.json"))
  names = [(sums.parent / name).relative_to(out) for name in json.loads(sums.read_text())["xxh3_128"]]
  assert {"hf": "model.safetensors" in map(str, names), "tsparse": len(names) > 12}[format]
  for name in harmed(out, names, copy, 16):
    with pytest.raises(UserError, match=f"{name.name}|is damaged"):
      parameters_of(open_model(copy))
  (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text())))
  same(parameters_of(open_model(out)), right)
  sums.unlink()  # as of others
  same(parameters_of(open_model(out)), right)


def test_no_flip_of_predictors_changes_them(run, tmp_path):
  model, rng = open_model(run[0]), np.random.default_rng(0)
  wide = predictors.with_predictors(MODEL, (4, 4), "after_norm")
  weights = {"fc1": rng.normal(size=(2, 16, 4)), "fc2": rng.normal(size=(2, 4, 24)), "threshold": rng.normal(size=2)}
  (tmp_path / "whole").mkdir()
  predictors.save(tmp_path / "whole", model, wide, weights, {"recall": 0.9, "read": {}})
  predictors.load(tmp_path / "whole", model)
  for _ in harmed(tmp_path / "whole", [predictors.WEIGHTS], tmp_path / "copy", 8):
    with pytest.raises(UserError, match=r"is damaged .predictors.safetensors"):
      predictors.load(tmp_path / "copy", model)


TEXTS = [f"doc {i} " + "x" * (i % 7) for i in range(200)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("TSPARSE_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(sources, "KEPT_BYTES", 0)  # the index of every file is kept
  return tmp_path / "cache"


def read(path):
  sources._documents.cache_clear()  # as another process
  documents = read_documents(str(path))
  return [documents.read(i).decode() for i in range(len(documents))]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_no_flip_or_cut_of_the_cache_changes_a_text(suffix, cache, tmp_path, caplog):
  path = tmp_path / f"text{suffix}"
  lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
  path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
  assert read(path) == TEXTS
  whole = shutil.copytree(cache, tmp_path / "whole")
  names, seen = files_under(whole), []
  for name in harmed(whole, names, tmp_path / "copy", 80):
    shutil.rmtree(cache)
    shutil.copytree(tmp_path / "copy", cache)
    caplog.clear()
    try:
      found, seen = read(path), [*seen, "made again" if "it is made again" in caplog.text else "harmless"]
    except UserError as error:
      assert "is not the one that was indexed" in str(error) and "made again when you start again" in str(error)
      found, seen = read(path), [*seen, "ended"]
    assert found == TEXTS, name
  assert seen.count("made again") > 20 and (suffix == ".jsonl" or seen.count("ended") > 10)


def test_a_file_that_changes_with_its_size_and_time_kept_is_noticed(cache, tmp_path):
  path = tmp_path / "text.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
  documents, state = read_documents(str(path)), path.stat()
  path.write_text(path.read_text().replace("doc 7 ", "dog 7 "))
  os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
  assert documents.read(6).decode() == TEXTS[6]
  with pytest.raises(UserError, match="the text at byte .* of .*text.jsonl is not the one that was indexed.*touch it"):
    documents.read(7)


def test_a_damaged_extract_of_the_standard_library_is_made_again(cache, tmp_path, monkeypatch, caplog):
  (tmp_path / "library").mkdir()
  (tmp_path / "library" / "m.py").write_text('"""What the module is for, in words."""\n' * 3)
  monkeypatch.setattr(stdlib, "library", lambda: tmp_path / "library")
  folder = stdlib.extracted()
  file = next(path for path in folder.glob("stdlib_docs.*.jsonl") if path.stat().st_size)
  right = file.read_bytes()
  file.write_bytes(right.replace(b"module", b"nodule"))
  assert stdlib.extracted() == folder and file.read_bytes() == right
  assert f"{file.name} has other bytes than were written" in caplog.text
