"""One loader for every M of the command line: a Hugging Face directory, or a workdir of ours."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from tsparse import workdir as workdirs
from tsparse.convert import stored
from tsparse.convert.huggingface import Directory
from tsparse.convert.leaf import Leaf, whole
from tsparse.data.tokenizer_files import vocabulary_of
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig
from tsparse.sharding import path_name
from tsparse.train import checkpoint

ROW = 512  # tokens that a model is evaluated on where nothing says how it was trained


@dataclasses.dataclass(frozen=True)
class Model:
  """A stored model; its parameters are read when asked for.

  Attributes:
    path: where it is.
    config: the model, its activation included.
    vocabulary: what `tsparse.data.load_vocabulary` takes to load its tokenizer.
    eos: whether it was trained on documents that end with the vocabulary's end-of-text token, as far as is known.
    bos: whether its texts begin with BOS, "on" or "off" as it was trained here, or "auto": as its tokenizer does.
    step: of the checkpoint; 0 for Hugging Face.
    row: tokens of a row to evaluate it on: as it was trained here, else 512, or its context where that is shorter.
    restore: (tree of ShapeDtypeStruct with shardings) -> (parameters, tokens it was trained on by us).
    leaves: () -> (path of each parameter -> Leaf, which reads it slice by slice, the same tokens).
  """

  path: Path
  config: ModelConfig
  vocabulary: str
  eos: bool
  bos: str
  step: int
  row: int
  restore: Callable[[Any], tuple[Any, int]]
  leaves: Callable[[], tuple[dict[str, Leaf], int]]


def open_model(path: Path, step: int | None = None) -> Model:
  """The model stored in a folder: of a workdir the newest checkpoint, or that of `step`.

  Raises:
    UserError: the folder is neither a Hugging Face directory nor a workdir, or is damaged.
  """
  fields = workdirs.read_config(path)
  if "model_type" in fields:
    directory = Directory(path)
    return Model(
      path,
      directory.config,
      directory.vocabulary,
      directory.eos,
      directory.bos,
      step=0,
      row=min(ROW, directory.config.max_seq_len),
      restore=lambda target: (place_leaves(directory.leaves(), target), 0),
      leaves=lambda: (directory.leaves(), 0),
    )
  try:
    config = ModelConfig(**fields["model"], activation=fields["activation"])
    vocabulary, eos = fields["data"]["vocabulary"], fields["data"].get("eos", True)
    bos = fields["data"].get("bos", "on" if "train" in fields else "auto")  # before there was a choice: trained with it
  except (KeyError, TypeError) as error:
    raise UserError(f"{path}/config.json is neither of Hugging Face nor of a workdir of tsparse ({error}).") from None
  inside = path / vocabulary  # of a converted checkpoint, which carries its tokenizer
  vocabulary = str(inside) if inside.exists() else vocabulary_of(path, vocabulary)
  step = checkpoint.latest_step(path) if step is None else step
  return Model(
    path,
    config,
    vocabulary,
    eos,
    bos,
    step,
    fields.get("train", {}).get("seq_len") or min(ROW, config.max_seq_len),
    restore=lambda target: checkpoint.restore_parameters(path, step, target),
    leaves=lambda: stored.read(path, step, config),
  )


def place_leaves(leaves: Mapping[str, Leaf], target: Any) -> Any:
  """The parameters as arrays with the dtypes and shardings of `target`; one at a time is whole on this host."""

  def place(path: tuple, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(whole(leaves[path_name(path)], wanted.dtype), wanted.sharding)

  return jax.tree_util.tree_map_with_path(place, target)
