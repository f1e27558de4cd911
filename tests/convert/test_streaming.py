"""Conversion slice by slice: what is held, what is stored, and what is left when it does not come to its end."""

import dataclasses
import fcntl
import gc
import io
import json
import os
import shutil
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax import traverse_util
from rich.console import Console
from rich.filesize import decimal

from tests import commands
from tsparse.convert import huggingface, rules, stored
from tsparse.convert.convert import convert
from tsparse.convert.families import export_format
from tsparse.convert.leaf import Leaf, contiguous, whole
from tsparse.convert.model import open_model
from tsparse.errors import UserError
from tsparse.models.config import PRESETS
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.sharding import make_mesh, path_name, shardings
from tsparse.train import checkpoint
from tsparse.train.step import TrainState

CONFIG = dataclasses.replace(PRESETS["tiny_moe"], d_model=64, d_ff=96, num_heads=4, num_kv_heads=2, head_dim=16)
BFLOAT16 = jnp.dtype("bfloat16")


def parameters(config=CONFIG, dtype=BFLOAT16):
  """Path -> random values; one parameter is all zeros."""
  rng = np.random.default_rng(0)
  shapes, _ = abstract_parameters(Transformer(config))
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  values = {path_name(path): rng.standard_normal(x.shape).astype(dtype) for path, x in leaves}
  values["final_norm"][:] = 0
  return values


def leaves(values):
  depths = {
    name: name.startswith("layers") + (name.startswith("layers/ffn/") and "router" not in name) for name in values
  }
  return {name: Leaf(x.shape, x.dtype, depths[name], x.__getitem__) for name, x in values.items()}


def write_huggingface(folder, values, config=CONFIG, dtype="bfloat16"):
  fields, mapping, modeling = export_format(config, dtype)
  folder.mkdir()
  huggingface.write_directory(folder, fields, rules.to_theirs(mapping, config, leaves(values)), modeling)


def expect(found, values):
  assert found.keys() == values.keys()
  for name, value in values.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def flat(tree):
  return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def restore(path, mesh, config=CONFIG):
  shapes, logical = abstract_parameters(Transformer(config))
  return open_model(path).restore(checkpoint.abstract(shapes, shardings(mesh, logical)))


def files_of(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def theirs(tmp_path):
  write_huggingface(tmp_path / "theirs", parameters())
  return tmp_path / "theirs"


def test_a_converted_checkpoint_keeps_its_dtype_and_restores_sharded_in_float32(theirs, tmp_path):
  convert(theirs, tmp_path / "ours", "tsparse")
  values = parameters()
  found, tokens = open_model(tmp_path / "ours").leaves()
  assert tokens == 0 and all(leaf.dtype == BFLOAT16 for leaf in found.values())
  expect({name: whole(leaf, leaf.dtype) for name, leaf in found.items()}, values)
  mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "expert": 2})
  for path in (theirs, tmp_path / "ours"):
    params, _ = restore(path, mesh)
    gate = params["layers"]["ffn"]["gate"]
    assert gate.dtype == np.float32 and gate.addressable_shards[0].data.size == gate.size // 8
    expect(flat(params), {name: value.astype(np.float32) for name, value in values.items()})


def test_dtypes_are_kept_leaf_by_leaf_and_cast_on_request(tmp_path):
  values = parameters()
  values["embed"] = values["embed"].astype(np.float32) + np.float32(1e-4)  # more than bfloat16 can hold
  values["layers/ffn/up"] = values["layers/ffn/up"].astype(np.float16)
  write_huggingface(tmp_path / "theirs", values)
  convert(tmp_path / "theirs", tmp_path / "ours", "tsparse")
  found, _ = open_model(tmp_path / "ours").leaves()
  float32 = {name for name, leaf in found.items() if leaf.dtype == np.float32}
  assert float32 == {"embed", "layers/ffn/up"}
  expect({name: whole(leaf, np.float32) for name, leaf in found.items()}, {k: np.float32(v) for k, v in values.items()})

  for source, form in (("theirs", "tsparse"), ("theirs", "hf"), ("ours", "hf")):
    out = tmp_path / f"{source}_{form}"
    convert(tmp_path / source, out, form, dtype="bfloat16")
    found, _ = open_model(out).leaves()
    assert all(leaf.dtype == BFLOAT16 for leaf in found.values())
    expect({k: whole(v, v.dtype) for k, v in found.items()}, {k: v.astype(BFLOAT16) for k, v in values.items()})
  assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["tsparse", "hf"])
def test_no_more_than_three_slices_or_a_file_of_them_are_held_while_a_model_is_written(form, tmp_path, monkeypatch):
  """The one being read, the one being written and the one that Python has not let go of."""
  monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
  alive, most, largest = {}, 0, 0

  class Part(np.ndarray):  # can be referenced weakly
    pass

  def watched(leaf):
    def read(index):
      nonlocal most, largest
      part = np.array(leaf.read(index)).view(Part)
      alive[id(part)] = part.nbytes
      weakref.finalize(part, alive.pop, id(part))
      most, largest = max(most, sum(alive.values())), max(largest, part.nbytes)
      return part

    return dataclasses.replace(leaf, read=read)

  watching = {name: watched(leaf) for name, leaf in leaves(parameters()).items()}
  if form == "tsparse":
    stored.save(tmp_path, watching, 0)
  else:
    fields, mapping, modeling = export_format(CONFIG, "bfloat16")
    huggingface.write_directory(tmp_path, fields, rules.to_theirs(mapping, CONFIG, watching), modeling)
  gc.collect()
  assert not alive and most <= 3 * largest + (40_000 if form == "hf" else 0)


def test_shards_of_hugging_face_are_written_when_they_are_full(theirs, tmp_path, monkeypatch):
  convert(theirs, tmp_path / "ours", "tsparse")
  monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
  convert(tmp_path / "ours", tmp_path / "back", "hf")
  shards = sorted((tmp_path / "back").glob("*.safetensors"))
  assert len(shards) > 5 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
  assert all(path.stat().st_size < 40_000 + 10_000 for path in shards[1:])  # and its header
  before, after = huggingface.Directory(theirs), huggingface.Directory(tmp_path / "back")
  assert before.names == after.names
  assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.names)


@pytest.mark.parametrize("chunk_bytes", [2**30, 20_000])
def test_a_chunk_of_many_layers_is_read_once(chunk_bytes, tmp_path, monkeypatch):
  """As training writes them."""
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
  values = parameters(dtype=np.float32)
  tree = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(values, sep="/"))
  state = TrainState(step=jnp.asarray(4), params=tree, opt_state={"count": jnp.zeros(())})
  with checkpoint.manager(tmp_path, keep=1) as checkpoints:
    checkpoint.save(checkpoints, state, b"", 9)
  found, tokens = stored.read(tmp_path, 4, CONFIG)

  def read_bytes():
    (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]

  before = read_bytes()
  expect({name: whole(leaf, leaf.dtype) for name, leaf in found.items()}, values)
  size = sum(value.nbytes for value in values.values())
  assert tokens == 9 and 0.5 * size < read_bytes() - before < 1.2 * size


@pytest.mark.parametrize(
  ("shape", "depth", "chunk"),
  [
    ((3, 64, 1024 * 1024), 1, [1, 16, 1024 * 1024]),
    ((2, 4, 8, 8), 2, [1, 1, 8, 8]),
    ((17, 1024 * 1024), 0, [9, 1024 * 1024]),  # not 16 and 1: the second would be stored as 16
    ((4, 30_000_000), 1, [1, 15_000_000]),
    ((2, 40_000_000), 0, [1, 40_000_000]),
    ((5,), 1, [1]),
  ],
)
def test_chunks_are_slices_or_equal_parts_of_them(shape, depth, chunk):
  assert stored.chunk_shape(Leaf(shape, BFLOAT16, depth, None)) == chunk


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_helpers_agree_with_numpy(dtype):
  x = np.random.default_rng(0).standard_normal((5, 33, 70)).astype(jnp.dtype(dtype))
  for axes in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)):
    copy = contiguous(x.transpose(axes))
    assert copy.flags.c_contiguous
    np.testing.assert_array_equal(copy, x.transpose(axes))
  assert huggingface.finite(x) and huggingface.finite(x[:0])
  for value in (np.nan, -np.nan, np.inf, -np.inf):
    x[1, 2, 3] = value
    assert not huggingface.finite(x)
  x[1, 2, 3] = jnp.finfo(dtype).min
  assert huggingface.finite(x)


def test_tensors_of_different_widths_are_padded_with_zeros_and_come_back(monkeypatch):
  rule = rules.Rule("layers/x", "x.{layer}", "F D -> D F")
  widths = (3, 5, 4, 5)
  monkeypatch.setattr(rules, "sizes", lambda rule, config, index: {"D": 2, "F": widths[index[0]]})
  theirs = {f"x.{i}": np.random.default_rng(i).standard_normal((n, 2), np.float32) for i, n in enumerate(widths)}
  headers = {name: (x.shape, x.dtype) for name, x in theirs.items()}
  ours = rules.to_ours([rule], CONFIG, headers, theirs.get)
  assert ours["layers/x"].shape == (4, 2, 5)
  padded = whole(ours["layers/x"], np.float32)
  assert not padded[0, :, 3:].any() and padded[0, :, :3].all()
  expect({name: leaf.read(()) for name, leaf in rules.to_theirs([rule], CONFIG, ours).items()}, theirs)


def test_part_of_a_leaf_at_any_index():
  x = np.arange(24).reshape(2, 3, 4)
  for depth in (0, 1, 2):
    leaf = Leaf(x.shape, x.dtype, depth, x.__getitem__)
    for index in ((), (1,), (1, 2), (1, 2, 3)):
      np.testing.assert_array_equal(leaf.at(index), x[index])


def test_a_head_that_is_not_the_tied_embedding_is_refused(tmp_path):
  from safetensors.numpy import load_file, save_file

  config = dataclasses.replace(PRESETS["tiny"], tie_embeddings=True)
  write_huggingface(tmp_path / "theirs", parameters(config), config)
  (tmp_path / "theirs" / "checksums.json").unlink()  # changed on purpose
  path = tmp_path / "theirs" / "model.safetensors"
  tensors = load_file(path)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  save_file(tensors, path)
  convert(tmp_path / "theirs", tmp_path / "equal", "tsparse")
  tensors["lm_head.weight"][5, 6] += 1
  save_file(tensors, path)
  with pytest.raises(UserError, match=r"tie_word_embeddings, and lm_head.weight is not equal"):
    convert(tmp_path / "theirs", tmp_path / "other", "tsparse")
  assert not (tmp_path / "other").exists()


def test_progress_is_said_in_bytes(theirs, tmp_path):
  text = io.StringIO()
  convert(theirs, tmp_path / "ours", "tsparse", console=Console(file=text, width=100))
  warning, first, *_, last = text.getvalue().splitlines()
  assert "is written without a tokenizer" in warning
  total = decimal(sum(value.nbytes for value in parameters().values()))
  assert first.startswith("converting  ") and f"  {total} of {total}  " in last and last.endswith("B/s")
  bar = io.StringIO()
  convert(theirs, tmp_path / "back", "hf", console=Console(file=bar, force_terminal=True, width=100))
  assert "100%" in bar.getvalue() or "/s" in bar.getvalue()


def test_a_conversion_that_does_not_fit_is_refused(theirs, tmp_path, monkeypatch):
  before = files_of(tmp_path)
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
  for form in ("tsparse", "hf"):
    with pytest.raises(UserError, match=r"needs [\d.]+ kB and its disk has 100.0 kB left"):
      convert(theirs, tmp_path / "a" / "b", form)
  assert files_of(tmp_path) == before


def run(*arguments, code):
  """`experiments/convert.py` in a process of its own, after some other code."""
  return commands.run("experiments/convert.py", *arguments, before=code)


@pytest.mark.parametrize("form", ["tsparse", "hf"])
def test_a_full_disk_is_one_sentence_and_no_output(form, theirs, tmp_path):
  before = files_of(tmp_path)
  limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"  # bytes of one file
  done = run(f"--model={theirs}", f"--out={tmp_path}/out", f"--format={form}", code=limit)
  assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
  assert "could not be written (File too large" in done.stderr
  assert files_of(tmp_path) == before


@pytest.mark.parametrize("form", ["tsparse", "hf"])
@pytest.mark.parametrize("moment", ["first slice", "middle", "before config.json"])
def test_a_killed_conversion_leaves_no_model_and_the_next_one_cleans_up(form, moment, theirs, tmp_path):
  count = {"first slice": 1, "middle": 20, "before config.json": 10**9}[moment]
  code = f"""
import os, signal
from pathlib import Path
from tsparse import files, progress
from tsparse.convert import huggingface
huggingface.SHARD_BYTES = 40_000
def kill(): os.kill(os.getpid(), signal.SIGKILL)
calls, advance, write = [], progress.ByteProgressLine.advance, files.write
def counted(self, **arguments):
  calls.append(1)
  if len(calls) == {count}: kill()
  advance(self, **arguments)
def stopped(path, content):
  if Path(path).name == "config.json": kill()
  write(path, content)
progress.ByteProgressLine.advance, files.write = counted, stopped
"""
  arguments = [f"--model={theirs}", f"--out={tmp_path}/out", f"--format={form}"]
  assert run(*arguments, code=code).returncode == -signal.SIGKILL
  (scratch,) = tmp_path.glob(".out.*")
  begun = any(scratch.iterdir())
  assert not (tmp_path / "out").exists() and (begun or (form, moment) == ("hf", "first slice"))  # no shard yet
  with pytest.raises(UserError, match="no model"):
    open_model(scratch)
  alive = tmp_path / ".out.1.tsparse"  # of a conversion that goes on
  alive.mkdir()
  lock = os.open(alive, os.O_RDONLY)
  fcntl.flock(lock, fcntl.LOCK_EX)
  done = run(*arguments, code="")
  os.close(lock)
  assert done.returncode == 0 and f"removing {scratch}" in done.stderr, done.stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1.tsparse", "out", "theirs"]
  found, _ = open_model(tmp_path / "out").leaves()
  expect({name: whole(leaf, leaf.dtype) for name, leaf in found.items()}, parameters())


def test_the_benchmark_runs():
  done = commands.run("benchmarks/convert.py", "--preset=tiny_moe")
  assert done.returncode == 0, done.stderr
  assert "bit for bit" in done.stdout and done.stdout.count("  2.00") == 3  # the limit, in each row
