"""Hugging Face directories: reading and writing config.json, safetensors shards and the tokenizer's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from tsparse import checksums, files
from tsparse.convert import rules
from tsparse.convert.families import HEAD, IGNORED, read_config
from tsparse.convert.leaf import Leaf
from tsparse.data import tokenizer_files
from tsparse.data.encoding import first_token, load_tokenizer, same_tokenizer
from tsparse.data.tokenizer import FILES, Source, read_tokenizer
from tsparse.errors import UserError

SHARD_BYTES = 5 * 10**8  # of a file: safetensors wants all its tensors in memory

# Fields of config.json that say how many tensors there are of a kind.
COUNTS = {"num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts"}

# dtype of safetensors -> ours; float16 has no place in our models, and float32 holds it exactly
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float32"), "BF16": jnp.dtype("bfloat16")}
# dtype -> (all bits but the sign, the exponent's, which are all set in numbers that are not finite)
BITS = {"float16": (0x7FFF, 0x7C00), "bfloat16": (0x7FFF, 0x7F80), "float32": (0x7FFF_FFFF, 0x7F80_0000)}


class Stored(NamedTuple):
  """What the header of a safetensors file says of a tensor."""

  file: Path
  shape: tuple[int, ...]
  dtype: str  # a key of DTYPES, or another that is not supported


class Directory:
  """A Hugging Face model directory, opened: its config is read and its tensors are known, none is loaded.

  Attributes:
    config: the model.
    vocabulary: what loads its tokenizer: the folder, unless we exported a model over bytes.
    eos: whether documents end with an end-of-text token: as we exported it, else if the tokenizer adds one.
    bos: whether documents begin with BOS, "on" or "off" as we exported it, else "auto", as the tokenizer does.

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
    self._stored = _tensors(folder)
    shapes = {name: tensor.shape for name, tensor in self._stored.items()}
    for name in COUNTS & fields.keys():  # before their tensors are named one by one: a damaged number may be any
      if isinstance(fields[name], int) and fields[name] > len(shapes):
        raise UserError(f"{folder}/config.json says {name} = {fields[name]} and there are {len(shapes)} tensors.")
    self._rules, self.config = read_config(fields, shapes)
    # No path: a checkpoint has no say in which files of this machine are read.
    self.vocabulary = "bytes" if fields.get("tsparse_vocabulary") == "bytes" else str(folder)
    self.eos = bool(fields.get("tsparse_eos", _adds_eos(folder)))
    self.bos = str(fields.get("tsparse_bos", "auto"))
    ignored = [*IGNORED, *([HEAD.theirs] if self.config.tie_embeddings else [])]
    rules.check_names(self._rules, self.config, self._stored, ignored)

  @property
  def names(self) -> set[str]:
    """Of all tensors."""
    return set(self._stored)

  def leaves(self) -> dict[str, Leaf]:
    """Our parameters, path -> Leaf.

    Raises:
      UserError: a tensor has another shape than the config says or a dtype that is not supported, or tied embeddings
        are not equal, or a file that we wrote has other bytes. Reading a slice raises when the file is damaged there.
    """
    verify(self.folder, "convert the model again")
    names = [name for rule in self._rules for _, name in rules.sources(rule, self.config)]
    for name in names:
      if self._stored[name].dtype not in DTYPES:
        dtype = self._stored[name].dtype
        raise UserError(f"tensor {name} is stored as {dtype}; only float32, float16 and bfloat16 are supported.")
    self._check_tied()
    stored = {name: (self._stored[name].shape, DTYPES[self._stored[name].dtype]) for name in names}
    return rules.to_ours(self._rules, self.config, stored, self.read)

  def _check_tied(self):
    embedding, head = next(rule.theirs for rule in self._rules if rule.ours == "embed"), HEAD.theirs
    tied = self.config.tie_embeddings and head in self._stored
    if tied and not np.array_equal(self._load(embedding), self._load(head)):
      raise UserError(
        f"config.json says tie_word_embeddings, and {head} is not equal to {embedding}: set it to false in config.json "
        "to keep both, or take the tensor away."
      )

  def read(self, name: str) -> np.ndarray:
    """One tensor as stored; a warning says when it holds values that are not finite."""
    tensor = self._load(name)
    if not finite(tensor):
      logging.warning("tensor %s of %s holds values that are not finite", name, self._stored[name].file)
    return tensor

  def _load(self, name: str) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    file = self._stored[name].file
    try:
      with safe_open(file, framework="np") as opened:  # for each tensor: mapped pages are given back when it closes
        return opened.get_tensor(name)
    except SafetensorError as error:
      raise UserError(f"{file} is damaged ({error}): fetch it again.") from None
    except OSError as error:
      raise unreadable(file, error) from None


def finite(tensor: np.ndarray) -> bool:
  """Whether all values are finite; by their bits, which for bfloat16 is twice as fast as NumPy."""
  magnitude, exponent = BITS[tensor.dtype.name]
  bits = tensor.view(f"u{tensor.itemsize}")
  return not bits.size or (bits & bits.dtype.type(magnitude)).max() < exponent


def _tensors(folder: Path) -> dict[str, Stored]:
  """Every tensor in the safetensors files of a directory.

  An index, where there is one, says which files are read and, of a tensor that several of them hold, whose is taken.
  Without an index `model.safetensors` is read alone, as transformers does, or else every file there.

  Raises:
    UserError: there is none, one is missing or damaged, or two hold the same tensor and no index says which counts.
  """
  from safetensors import SafetensorError, safe_open

  index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
  weight_map = _weight_map(index) if index.exists() else {}
  shards = [folder / name for name in sorted(set(weight_map.values()))]
  if shards and single.exists() and single not in shards:
    logging.warning("%s names other files than %s, which is not read", index, single.name)
  shards = shards or ([single] if single.exists() else sorted(folder.glob("*.safetensors")))
  if not shards:
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
      raise UserError(
        f"{folder} holds only pickle files ({pickles[0]}), which can run code when read: convert it to safetensors "
        "elsewhere, by transformers' `save_pretrained(folder, safe_serialization=True)`."
      )
    raise UserError(f"{folder} holds no .safetensors file: give a whole Hugging Face directory.")
  stored: dict[str, Stored] = {}
  for shard in shards:
    try:
      with safe_open(shard, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
          header, other = file.get_slice(name), stored.get(name)
          if other and name not in weight_map:
            raise UserError(
              f"{other.file} and {shard.name} both hold a tensor {name}, and no {index.name} says which counts: move "
              "the file that is not of this model out of the folder."
            )
          if other is None or weight_map[name] == shard.name:
            stored[name] = Stored(shard, tuple(header.get_shape()), header.get_dtype())
    except FileNotFoundError:
      raise UserError(f"{shard} is missing and {index.name} names it: fetch it.") from None
    except SafetensorError as error:
      raise UserError(f"{shard} is damaged ({error}): fetch it again.") from None
    except OSError as error:
      raise unreadable(shard, error) from None
  return stored


def _weight_map(index: Path) -> dict[str, str]:
  """Tensor -> the file that holds it, by model.safetensors.index.json."""
  try:
    weight_map = dict(json.loads(index.read_text())["weight_map"])
    outside = [name for name in weight_map.values() if Path(name).name != name or name == ".."]
  except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
    raise UserError(f"{index} is damaged ({error}): fetch it again.") from None
  if outside:
    raise UserError(f"{index} names files outside its folder ({outside[0]}): it is not to be trusted.")
  return weight_map


def verify(folder: Path, mend: str):
  """Raises UserError, with what would `mend` it, where weights have other bytes than we wrote; others' are taken."""
  try:
    checksums.verify(folder)
  except checksums.Mismatch as error:
    raise UserError(
      f"{folder} is damaged ({error}): {mend}, or take {checksums.NAME} away if you changed the file on purpose."
    ) from None
  except OSError as error:
    raise unreadable(folder, error) from None


def unreadable(file: Path, error: OSError) -> UserError:
  """The sentence for a file that the system does not give; its bytes may be whole."""
  return UserError(f"{file} cannot be read ({error}): make it readable, then give the same command again.")


def _adds_eos(folder: Path) -> bool:
  path = folder / "tokenizer_config.json"
  try:
    fields = json.loads(path.read_text()) if path.exists() else {}
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
  return isinstance(fields, dict) and bool(fields.get("add_eos_token"))


def copy_tokenizer(vocabulary: str, target: Path):
  """Copies the files of a tokenizer; its BOS and EOS go to generation_config.json if there is none, for transformers.

  Args:
    vocabulary: a folder with a tokenizer's files, or one of them.
    target: a folder.
  """
  tokenizer_files.copy_files(vocabulary, target)
  tokenizer = load_tokenizer(vocabulary)
  own = {"bos_token_id": tokenizer.bos} if tokenizer.bos != tokenizer.eos else {}
  ids = own | {"eos_token_id": tokenizer.eos} | tokenizer_files.special_ids(vocabulary)
  if not (target / "generation_config.json").exists():
    files.write(target / "generation_config.json", files.to_json(ids))
  beside = target / "tokenizer.json"  # of the two it would be read
  if vocabulary.endswith(".model") and beside.exists() and not _same(str(beside), vocabulary):
    logging.warning("%s is another tokenizer than the tokenizer.json beside it, which is left out", vocabulary)
    beside.unlink()


def _same(other: str, vocabulary: str) -> bool:
  try:
    return same_tokenizer(load_tokenizer(other), load_tokenizer(vocabulary))
  except UserError:  # of the other: this one was read before
    return False


def put_bos(folder: Path, bos: str):
  """Makes transformers put BOS, or none, before the texts of a folder's tokenizer, as `config.data.bos` says.

  A tokenizer.json says so by its post-processor, a SentencePiece model by `add_bos_token` beside it.
  """
  if not any((folder / name).is_file() for name in FILES):
    return
  source, tokenizer = read_tokenizer(str(folder)), load_tokenizer(str(folder))
  first, path = first_token(tokenizer, bos), folder / "tokenizer_config.json"
  fields = json.loads(path.read_text()) if path.exists() else {}
  token = {i: name for name, i in tokenizer.table.items()}[tokenizer.bos]
  if not source.is_json:
    if fields.get("add_bos_token") != (first is not None):  # where nothing is said, transformers puts none, and we do
      files.write(path, files.to_json(fields | {"add_bos_token": first is not None, "bos_token": token}))
    return
  if tokenizer.adds_bos == (first is not None):
    return
  whole = json.loads(source.content)
  whole["post_processor"] = _post_processor(None if first is None else (token, first), _last(source))
  files.write(Path(source.path), json.dumps(whole, ensure_ascii=False))
  if source.adds_bos is not None:  # the class would not heed it
    files.write(path, files.to_json(fields | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _last(source: Source) -> tuple[str, int] | None:
  """The token, and its id, that the post-processor of a tokenizer.json puts behind a text, if it puts one."""
  import tokenizers  # here, so that importing this module stays light

  framed = tokenizers.Tokenizer.from_str(source.content.decode()).encode("a")
  return (framed.tokens[-1], framed.ids[-1]) if framed.special_tokens_mask[1:][-1:] == [1] else None


def _post_processor(first: tuple[str, int] | None, last: tuple[str, int] | None) -> dict[str, Any]:
  """The field of a tokenizer.json that puts tokens, each with its id, before and behind a text and its pair."""

  def around(sequence: str, number: int) -> list[dict[str, Any]]:
    before, behind = ([{"SpecialToken": {"id": each[0], "type_id": number}}] if each else [] for each in (first, last))
    return [*before, {"Sequence": {"id": sequence, "type_id": number}}, *behind]

  special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in filter(None, (first, last))}
  single = around("A", 0)
  return {"type": "TemplateProcessing", "single": single, "pair": single + around("B", 1), "special_tokens": special}


def write_directory(folder: Path, fields: dict[str, Any], tensors: Mapping[str, Leaf], modeling: dict[str, str]):
  """Writes a Hugging Face directory; config.json comes last, so that half a directory is never taken for a whole.

  The weights get checksums, and nothing else: config.json and the tokenizer may be edited.

  Args:
    folder: exists and holds no model.
    fields: of config.json.
    tensors: name -> Leaf of depth 0; those of one file are in memory at a time.
    modeling: name -> text of Python files that go with it.

  Raises:
    OSError: the disk is full, or fails otherwise.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import save_file

  shards: list[dict[str, Leaf]] = [{}]
  for name, tensor in tensors.items():
    if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
      shards.append({})
    shards[-1][name] = tensor
  weight_map, sums = {}, {}
  for i, shard in enumerate(shards):
    file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    try:
      save_file({name: leaf.read(()) for name, leaf in shard.items()}, folder / file, metadata={"format": "pt"})
    except SafetensorError as error:
      raise OSError(str(error).rpartition(": ")[2]) from error
    sums[file] = checksums.checksum(folder / file)  # while the system still has it in memory
    files.by_umask(folder / file)
    weight_map.update(dict.fromkeys(shard, file))
  checksums.note(folder, sums)
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    files.write(folder / "model.safetensors.index.json", files.to_json(index))
  for name, text in modeling.items():
    files.write(folder / name, text)
  files.write(folder / "config.json", files.to_json(fields))
