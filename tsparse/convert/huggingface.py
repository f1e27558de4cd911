"""Hugging Face directories: reading and writing config.json, safetensors shards and the tokenizer's files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tsparse import files
from tsparse.convert import rules
from tsparse.convert.families import IGNORED, read_config
from tsparse.errors import UserError

TOKENIZER_FILES = (
  "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "generation_config.json", "chat_template.jinja",
)  # fmt: skip
SHARD_BYTES = 4 * 1024**3


class Directory:
  """A Hugging Face model directory, opened: its config is read and its tensors are known, none is loaded.

  Attributes:
    config: the model.
    vocabulary: what loads its tokenizer: the folder, unless we exported a model over bytes.

  Raises:
    UserError: no config.json or safetensors, an unsupported config, a missing or damaged shard, or tensors that are
      not those of the config.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    try:
      fields = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
      raise UserError(f"{folder}/config.json cannot be read ({error}): give a Hugging Face directory.") from None
    self._where, shapes = _tensor_files(folder)
    self._rules, self.config = read_config(fields, shapes)
    self.vocabulary = fields.get("tsparse_vocabulary", str(folder))
    ignored = [*IGNORED, *(["lm_head.weight"] if self.config.tie_embeddings else [])]
    rules.check_names(self._rules, self.config, self._where, ignored)

  @property
  def dtype(self) -> str:
    """The dtype of the stored weights."""
    return str(self.read("model.embed_tokens.weight").dtype)

  def read(self, name: str) -> np.ndarray:
    """One tensor as stored."""
    from safetensors import SafetensorError, safe_open

    try:
      with safe_open(self._where[name], framework="np") as file:
        tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
      raise UserError(f"{self._where[name]} is damaged ({error}): fetch it again.") from None
    if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
      raise UserError(f"tensor {name} is stored as {tensor.dtype}; only float32, float16 and bfloat16 are supported.")
    if not np.isfinite(tensor.astype(np.float32)).all():
      logging.warning("tensor %s of %s holds values that are not finite", name, self._where[name])
    return tensor

  def parameters(self) -> Iterable[tuple[str, np.ndarray]]:
    """Yields (path, float32 parameter) of our tree."""
    return rules.to_ours(self._rules, self.config, self.read)


def _tensor_files(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
  """Name of every tensor -> the safetensors file that holds it, and its shape."""
  from safetensors import SafetensorError, safe_open

  index = folder / "model.safetensors.index.json"
  if index.exists():
    try:
      names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
      raise UserError(f"{index} is damaged ({error}): fetch it again.") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
      raise UserError(f"{index} names files outside its folder ({outside[0]}): it is not to be trusted.")
    shards = [folder / name for name in sorted(names)]
  else:
    shards = sorted(folder.glob("*.safetensors"))
  if not shards:
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
      raise UserError(
        f"{folder} holds only pickle files ({pickles[0]}), which can run code when read: convert it to safetensors "
        "elsewhere, by transformers' `save_pretrained(folder, safe_serialization=True)`."
      )
    raise UserError(f"{folder} holds no .safetensors file: give a whole Hugging Face directory.")
  where, shapes = {}, {}
  for shard in shards:
    try:
      with safe_open(shard, framework="np") as file:
        where.update(dict.fromkeys(file.keys(), shard))
        shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError:
      raise UserError(f"{shard} is missing and {index.name} names it: fetch it.") from None
    except (SafetensorError, OSError) as error:
      raise UserError(f"{shard} is damaged ({error}): fetch it again.") from None
  return where, shapes


def copy_tokenizer(vocabulary: str, target: Path):
  """Copies the files of a tokenizer; BOS and EOS go to generation_config.json if there is none.

  Args:
    vocabulary: a folder with a tokenizer's files, or one of them.
    target: a folder.
  """
  source = Path(vocabulary) if Path(vocabulary).is_dir() else Path(vocabulary).parent
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)
  config = source / "config.json"
  fields = json.loads(config.read_text()) if config.exists() else {}
  ends = {key: fields[key] for key in ("bos_token_id", "eos_token_id") if fields.get(key) is not None}
  if ends and not (target / "generation_config.json").exists():
    files.write(target / "generation_config.json", files.to_json(ends))


def write_directory(
  folder: Path, fields: dict[str, Any], tensors: Iterable[tuple[str, np.ndarray]], modeling: dict[str, str]
):
  """Writes a Hugging Face directory; config.json comes last, so that half a directory is never taken for a whole.

  Args:
    folder: exists and is empty.
    fields: of config.json.
    tensors: (name, array) pairs, consumed one shard at a time.
    modeling: name -> text of Python files that go with it.
  """
  from safetensors.numpy import save_file

  shards: list[list[str]] = []
  held: dict[str, np.ndarray] = {}
  total = 0

  def flush():
    save_file(held, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
    shards.append(list(held))
    held.clear()

  for name, tensor in tensors:
    if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > SHARD_BYTES:
      flush()
    held[name] = tensor
    total += tensor.nbytes
  flush()
  weight_map = {}
  for i, names in enumerate(shards):
    final = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{i}.safetensors").replace(folder / final)
    weight_map.update(dict.fromkeys(names, final))
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write(folder / "model.safetensors.index.json", files.to_json(index))
  for name, text in modeling.items():
    files.write(folder / name, text)
  files.write(folder / "config.json", files.to_json(fields))
