"""Leaves in Orbax checkpoints: read and written slice by slice, by a handler that only the managers here know.

What is written is an ordinary checkpoint: `tsparse.train.checkpoint.restore_parameters`, or Orbax alone, reads it.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util
from jax.sharding import PartitionSpec

from tsparse.convert.leaf import Index, Leaf
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.sharding import path_name
from tsparse.train import checkpoint, damage

CHUNK_BYTES = 32 * 1024**2  # of one file: enough of them that all cores compress, few enough that a disk does not mind
STACKED = "LE"  # the axis letters that parameters are stacked over


def save(workdir: Path, leaves: Mapping[str, Leaf], tokens_seen: int):
  """Writes the parameters alone as step 0 of a workdir, a start for others, and waits until they are there.

  Args:
    workdir: holds no checkpoint.
    leaves: path of a parameter -> its values; two slices are in memory at a time.
    tokens_seen: tokens the model was trained on so far.

  Raises:
    OSError: the disk is full, or fails otherwise.
  """
  tree = traverse_util.unflatten_dict(dict(leaves), sep="/")
  arguments = ocp.args.Composite(params=ocp.args.PyTreeSave(tree), data=ocp.args.JsonSave({"tokens_seen": tokens_seen}))
  # Not in the background: there an interrupt would stop the command and not the writing.
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  folder = (workdir / "checkpoints").absolute()
  with ocp.CheckpointManager(folder, options=options, item_handlers=handlers()) as checkpoints:
    checkpoints.save(0, args=arguments)
  checkpoint.write_checksums(folder / "0")


def read(workdir: Path, step: int, config: ModelConfig) -> tuple[dict[str, Leaf], int]:
  """The parameters of a step, path -> Leaf, and the tokens they have seen.

  Args:
    workdir: of ours; written by `save` or by training.
    step: one of its checkpoints.
    config: its model.

  Raises:
    UserError: the step is not there (any more). A leaf whose data are damaged raises when it is read.
    RunFailure: it cannot be read, for another reason; a leaf likewise.
  """
  _, logical = abstract_parameters(Transformer(config))
  axes, structure = jax.tree_util.tree_flatten_with_path(logical, is_leaf=lambda x: isinstance(x, PartitionSpec))
  wanted = structure.unflatten([ocp.RestoreArgs(restore_type=Leaf)] * len(axes))
  arguments = ocp.args.Composite(
    params=ocp.args.PyTreeRestore(wanted, restore_args=wanted), data=ocp.args.JsonRestore()
  )
  found = checkpoint.restore_items(workdir, step, arguments, handlers())
  load = _loader(f"the checkpoint of step {step} in {workdir}")
  leaves = {}
  for (path, letters), store in zip(axes, structure.flatten_up_to(found["params"]), strict=True):
    depth = len(list(itertools.takewhile(STACKED.__contains__, letters)))
    leaves[path_name(path)] = Leaf(store.shape, store.dtype.numpy_dtype, depth, _slices(store, depth, load))
  return leaves, found["data"]["tokens_seen"]


def _loader(title: str) -> Callable[[ts.TensorStore], np.ndarray]:
  """Reads (a part of) a stored array and keeps it until the next is asked for, whatever parameter that is of."""
  kept: dict[ts.TensorStore, np.ndarray] = {}

  def load(part: ts.TensorStore) -> np.ndarray:
    if part not in kept:
      kept.clear()  # first: two of them may be more than memory holds
      try:
        kept[part] = damage.read_again(lambda: part.read().result())
      except Exception as error:  # memory that is short, and what TensorStore makes of a disk
        if not damage.is_damage(error):
          raise damage.failure_to_read(title, error) from error
        raise UserError(f"{title} is damaged ({reason(error)}): use another step, or another copy of it.") from None
    return kept[part]

  return load


def _slices(
  store: ts.TensorStore, depth: int, load: Callable[[ts.TensorStore], np.ndarray]
) -> Callable[[Index], np.ndarray]:
  """Reads slices of a stored array; a chunk that holds several is read once, if they are asked for in order."""
  chunk = store.chunk_layout.read_chunk.shape
  # Chunks of several layers come with all their experts, or the experts of one layer would be read for each layer.
  block = chunk[:1] + store.shape[1:depth] if depth and chunk[0] > 1 else chunk[:depth]

  @functools.cache
  def part(corner: Index) -> ts.TensorStore:
    starts = [i * n for i, n in zip(corner, block, strict=True)]
    return store[tuple(slice(i, min(i + n, size)) for i, n, size in zip(starts, block, store.shape, strict=False))]

  def read_slice(index: Index) -> np.ndarray:
    loaded = load(part(tuple(i // n for i, n in zip(index, block, strict=True))))
    found = loaded[tuple(i % n for i, n in zip(index, block, strict=True))]
    return found if found.size == loaded.size else found.copy()  # a view would keep the rest in memory

  return read_slice


def handlers() -> dict[str, ocp.CheckpointHandler]:
  """Of the items of a checkpoint, for a CheckpointManager whose parameters are leaves."""
  registry = ocp.type_handlers.create_type_handler_registry((Leaf, LeafHandler()))
  # Files, not Orbax's database, whose parts it merges in its own way when all are written.
  params = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
  return {"params": params, "data": ocp.JsonCheckpointHandler()}


class LeafHandler(ocp.type_handlers.NumpyHandler):
  """Stores a Leaf as Orbax stores a NumPy array, and opens what Orbax has stored as a TensorStore."""

  async def serialize(self, values, infos, args=None):
    """Writes Leaf after Leaf, now."""
    del args
    for leaf, info in zip(values, infos, strict=True):
      _write(leaf, info)
    return []

  async def deserialize(self, infos, args=None) -> list[ts.TensorStore]:
    """The stored arrays, opened."""
    del args
    return [ts.open(_spec(info), context=info.ts_context).result() for info in infos]


def _write(leaf: Leaf, info: ocp.type_handlers.ParamInfo):
  """Writes a leaf; the next slice is read while the one before it is written."""
  compressor = {"id": "zstd", "level": 1} if info.use_compression else None
  metadata = {"chunks": chunk_shape(leaf), "compressor": compressor}
  spec = _spec(info) | {"metadata": metadata, "store_data_equal_to_fill_value": True}  # Orbax refuses missing chunks
  dtype = ts.dtype(leaf.dtype.name)
  store = _written(ts.open(spec, dtype=dtype, shape=leaf.shape, create=True, context=info.ts_context))
  writing = None
  try:
    for index in leaf.indices:
      part = leaf.read(index)
      if writing:
        _written(writing)
      writing = store[index].write(part)
    _written(writing)
  finally:
    if writing:
      writing.exception()  # waits: nothing may write any more once this has failed


def _written(future: Any) -> Any:
  """The result of a write of TensorStore's, whose errors are ValueErrors."""
  try:
    return future.result()
  except ValueError as error:
    raise OSError(reason(error).rpartition(": ")[2]) from error  # what is said before it names a file of ours


def reason(error: Exception) -> str:
  """The first line of an error, without the place in TensorStore's source that is said after it."""
  return str(error).partition("\n")[0].partition(" [")[0]


def chunk_shape(leaf: Leaf) -> list[int]:
  """Chunks hold one slice, or an equal part of its rows where that is more than CHUNK_BYTES."""
  inner = leaf.shape[leaf.depth :]
  parts = -(-leaf.nbytes // math.prod(leaf.shape[: leaf.depth]) // CHUNK_BYTES)  # rounded up
  # The last chunk is stored as long as the others, so they are cut to equal lengths.
  return [1] * leaf.depth + [-(-size // min(parts, size)) for size in inner[:1]] + list(inner[1:])


def _spec(info: ocp.type_handlers.ParamInfo) -> dict[str, Any]:
  """TensorStore's description of where Orbax keeps a parameter."""
  files = {"driver": "file", "path": f"{info.parent_dir}/"}
  place = {
    True: {"driver": "ocdbt", "base": files, "path": f"{info.name}/"},
    False: files | {"path": f"{info.path}/"},
  }[info.is_ocdbt_checkpoint]
  return {"driver": "zarr3" if info.use_zarr3 else "zarr", "kvstore": place}
