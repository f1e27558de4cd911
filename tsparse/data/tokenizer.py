"""Tokenizers from files, without TensorFlow: a SentencePiece model, or a Hugging Face tokenizer.json.

Both follow transformers, with whose ids theirs are equal:

- `encode` adds no special tokens: the packer puts BOS in front, where `config.data.bos` says so, and the task EOS at
  the end. Left to the tokenizer ("auto"), BOS is where transformers 5.23 puts it: the post-processor of a
  tokenizer.json decides, and `add_bos_token` of tokenizer_config.json beside it is not heeded. With a SentencePiece
  model that field decides; where it is not there texts begin with BOS, as such models are trained, though transformers
  puts none.
- A lone tokenizer.model gives SentencePiece's own ids, as the tokenizer.json published with such models do;
  transformers 5.23 reads such a file otherwise (leading spaces and runs of spaces) than the models were trained.
- Text that spells a special token (`<s>`, `<unk>`, `<|im_start|>`) becomes that token, not its letters. Where
  SentencePiece would spell it out, the text is cut there and each part is encoded by itself, with its leading space.
  Messages of a chat are the exception (`chat.py`): `Tokenizer.spell` gives their letters.
- Tokens beyond the tokenizer's own come from the files beside it: `added_tokens_decoder` of tokenizer_config.json, then
  added_tokens.json, then (for a SentencePiece model) tokenizer.json. A token that they name without an id, such as a
  `pad_token`, counts where the tokenizer has it; no id is made up for it.
- BOS and EOS are each the first that is given by tokenizer_config.json, special_tokens_map.json, the tokenizer itself
  (for tokenizer.json: what its post-processor puts around a text), and for tokenizer.json, which has no other field for
  them, config.json and generation_config.json.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsparse.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model")  # of a folder; the first is what transformers reads where both are there
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
# Classes of tokenizer_config.json that are deaf to the post-processor of their tokenizer.json -> whether they put BOS.
DEAF = {"CodeLlamaTokenizer": True, "GPTNeoXTokenizer": False}
HINT = "name 'bytes', a SentencePiece .model file, a tokenizer.json or a folder that holds one of them"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to ids and back.

  Attributes:
    path: of its file.
    digest: of its content.
    encode: text -> ids, without BOS and EOS.
    encode_all: the same of several texts in one call, in which Python's lock is free: other threads run.
    spell: text -> ids, where what spells a special token is its letters: transformers' `split_special_tokens`. A
      SentencePiece model matches its user-defined pieces all the same, as the tokenizers library does added tokens
      that are not special.
    decode: ids -> text; BOS and EOS are left out, other special tokens are written as they are spelled.
    table: token -> id, added tokens included.
    bos: the id a document begins with: EOS where the tokenizer has no BOS, as such models are trained.
    eos: the id a document ends with.
    unk: the id of what cannot be encoded, or None.
    adds_bos: whether BOS stands in front of a text unless one says otherwise, see above; never where the tokenizer has
      none.
    own_size: how many ids there are without the tokens that were added to the tokenizer; None for all.
    special: the tokens that are no text: controls, BOS and EOS among them.
  """

  path: str
  digest: str
  encode: Callable[[str], list[int]]
  encode_all: Callable[[Sequence[str]], list[list[int]]]
  spell: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]
  table: Mapping[str, int]
  bos: int
  eos: int
  unk: int | None
  adds_bos: bool = True
  own_size: int | None = None
  special: frozenset[str] = frozenset()

  @functools.cached_property
  def size(self) -> int:
    """How many ids there are, gaps between them included."""
    return max(self.table.values()) + 1


@dataclasses.dataclass(frozen=True)
class Source:
  """A tokenizer's file and what the files beside it say of it.

  Attributes:
    path: of the file.
    content: of the file.
    added: (id, fields of a `tokenizers.AddedToken`) of declared tokens; the id is None where only a name is given.
    named: "bos" or "eos" -> what it is in the order of precedence; a str is its token, an int its id, None the
      tokenizer's own.
    adds_bos: whether the files beside it put BOS in front of a text; None where they leave it to the tokenizer.
  """

  path: str
  content: bytes
  added: list[tuple[int | None, dict[str, Any]]]
  named: dict[str, list[str | int | None]]
  adds_bos: bool | None = None

  @property
  def is_json(self) -> bool:
    """Whether the file is a tokenizer.json, not a SentencePiece model."""
    return self.path.endswith(".json")

  @property
  def digest(self) -> str:
    """Equal for copies of the tokenizer whose files beside it say the same."""
    beside = [self.added, self.named] if self.added or any(n != [None] for n in self.named.values()) else ""
    return f"{zlib.crc32(json.dumps(beside).encode() if beside else b'', zlib.crc32(self.content)):08x}"


def read_tokenizer(name: str) -> Source:
  """The tokenizer file that `name` is or, of a folder, holds.

  Raises:
    UserError: there is none, or a file beside it is damaged.
  """
  path = os.path.expanduser(name)
  if os.path.isdir(path):
    held = [file for file in FILES if os.path.isfile(os.path.join(path, file))]
    if not held:
      raise UserError(f"config.data.vocabulary {name!r} is a folder without {' or '.join(FILES)}: {HINT}.")
    path = os.path.join(path, held[0])
  try:
    with open(path, "rb") as f:
      content = f.read()
  except OSError as e:
    raise UserError(f"config.data.vocabulary {name!r} cannot be read ({e.strerror}): {HINT}.") from e
  folder = os.path.dirname(path)
  try:
    return Source(path, content, _declared(folder, path), _named(folder, path), _adds_bos(folder, path))
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(
      f"A JSON file beside the vocabulary {path} is not laid out as transformers writes it ({e!r}): fetch it again."
    ) from e


def build_tokenizer(source: Source) -> Tokenizer:
  """Builds the tokenizer.

  Raises:
    UserError: the file is not of its kind, has no EOS, or the files beside it contradict it.
  """
  return _hugging_face(source) if source.is_json else _sentencepiece(source)


def _json(folder: str, file: str) -> dict[str, Any]:
  """A file's JSON object; empty where there is no such file."""
  path = os.path.join(folder, file)
  try:
    with open(path, encoding="utf-8") as f:
      value = json.load(f)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as e:
    raise UserError(f"{path} cannot be read ({e}): fetch it again.") from e
  if not isinstance(value, dict):
    raise UserError(f"{path} is not a JSON object: fetch it again.")
  return value


def _declared(folder: str, path: str) -> list[tuple[int | None, dict[str, Any]]]:
  """The tokens that the files beside a tokenizer declare, each once, in the order of their ids."""
  config, names = _json(folder, "tokenizer_config.json"), _json(folder, "special_tokens_map.json")
  found: dict[str, tuple[int | None, dict[str, Any]]] = {}

  def add(number, token, **flags):
    fields = {**flags, **token} if isinstance(token, dict) else {"content": token, **flags}
    content = fields["content"]
    kept = {key: bool(fields[key]) for key in FLAGS if key in fields}
    if not isinstance(content, str):
      raise TypeError(f"token {content!r}")
    if content:
      found.setdefault(content, (number, {"content": content, **kept}))

  for number, token in config.get("added_tokens_decoder", {}).items():
    add(int(number), token)
  for content, number in _json(folder, "added_tokens.json").items():
    add(int(number), content, special=True, normalized=False)
  if not path.endswith(".json"):
    for token in _json(folder, "tokenizer.json").get("added_tokens", []):
      add(int(token["id"]), token)
  for values in (config, names):
    for key, value in values.items():
      single = key.endswith("_token") and isinstance(value, str | dict)
      several = key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list)
      for token in [value] if single else value if several else []:
        add(None, token, special=True, normalized=False)
  return sorted(found.values(), key=lambda token: (token[0] is None, token[0] or 0, token[1]["content"]))


def _adds_bos(folder: str, path: str) -> bool | None:
  config = _json(folder, "tokenizer_config.json")
  if path.endswith(".json"):
    return DEAF.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
  return config.get("add_bos_token") if isinstance(config.get("add_bos_token"), bool) else None


def _named(folder: str, path: str) -> dict[str, list[str | int | None]]:
  ids = [_json(folder, file) for file in ("config.json", "generation_config.json") if path.endswith(".json")]
  tokens = [_json(folder, file) for file in ("tokenizer_config.json", "special_tokens_map.json")]

  def candidates(key):
    for value in (file.get(f"{key}_token") for file in tokens):
      token = value["content"] if isinstance(value, dict) else value
      if token not in (None, ""):  # transformers takes an empty one for none
        yield str(token)
    yield None
    for value in (file.get(f"{key}_token_id") for file in ids):
      value = value[0] if isinstance(value, list) and value else value
      if isinstance(value, int):
        yield value

  return {key: list(candidates(key)) for key in ("bos", "eos")}


def _ends(
  source: Source, table: Mapping[str, int], own: Mapping[str, int | None], adds_bos: bool
) -> tuple[int, int, bool]:
  """(BOS, EOS, `Tokenizer.adds_bos`) of a tokenizer that itself names `own` and, left alone, `adds_bos`."""
  ids, known = {}, set(table.values())
  for key, candidates in source.named.items():
    for given in candidates:
      ids[key] = own[key] if given is None else table.get(given, -1) if isinstance(given, str) else given
      if given is not None and ids[key] not in known:
        raise UserError(
          f"The files beside the vocabulary {source.path} name {given!r} as {key.upper()}, which it does not hold: "
          "fetch the files again."
        )
      if ids[key] is not None:
        break
  if ids["eos"] is None:
    hint = "name an eos_token in tokenizer_config.json beside it" + ("" if source.is_json else " or train it with one")
    raise UserError(f"The vocabulary {source.path} has no EOS to end documents with; {hint}.")
  if ids["bos"] is None:
    return ids["eos"], ids["eos"], False
  return ids["bos"], ids["eos"], adds_bos if source.adds_bos is None else source.adds_bos


def _hugging_face(source: Source) -> Tokenizer:
  import tokenizers  # here, so that importing this module stays light

  try:
    tokenizer = tokenizers.Tokenizer.from_str(source.content.decode())
  except Exception as e:  # the library raises no narrower class
    raise UserError(f"The vocabulary {source.path} is not a tokenizer.json ({e}): {HINT}.") from e
  tokenizer.no_truncation()  # the file may ask for both, meant for another use
  tokenizer.no_padding()
  known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  for number, fields in source.added:
    content = fields["content"]
    if content in known or (number is None and tokenizer.token_to_id(content) is None):  # no id is made up
      continue
    tokenizer.add_tokens([tokenizers.AddedToken(**fields)])
    given = tokenizer.token_to_id(content)
    if number not in (None, given):
      raise UserError(
        f"The files beside the vocabulary {source.path} give the token {content!r} the id {number}, "
        f"and it can only be {given}: fetch the files again."
      )

  def encode(text):
    return tokenizer.encode(text, add_special_tokens=False).ids

  def encode_all(texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

  @functools.cache  # a second tokenizer: the switch is not an argument of `encode`, which several threads call
  def speller():
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy

  def spell(text):
    return speller().encode(text, add_special_tokens=False).ids

  framed = tokenizer.encode("a")
  first, last = framed.special_tokens_mask[:1] == [1], framed.special_tokens_mask[1:][-1:] == [1]
  own = {"bos": framed.ids[0] if first else None, "eos": framed.ids[-1] if last else None}
  table = tokenizer.get_vocab()
  bos, eos, adds_bos = _ends(source, table, own, adds_bos=first)
  unk = getattr(tokenizer.model, "unk_token", None)  # Unigram has none to ask for

  def decode(ids):
    return tokenizer.decode([i for i in ids if i not in (bos, eos)], skip_special_tokens=False)

  special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
  special |= {token for token, i in table.items() if i in (bos, eos)}
  added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  own_size = 1 + max((number for token, number in table.items() if token not in added), default=-1)
  functions, ids = (encode, encode_all, spell, decode), (bos, eos, table.get(unk))
  return Tokenizer(source.path, source.digest, *functions, table, *ids, adds_bos, own_size, frozenset(special))


def _sentencepiece(source: Source) -> Tokenizer:
  import sentencepiece  # here, so that importing this module stays light

  model = sentencepiece.SentencePieceProcessor()
  try:
    model.LoadFromSerializedProto(source.content)
    table = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    if not table:  # an empty file
      raise RuntimeError("no pieces")
  except (RuntimeError, UnicodeDecodeError) as e:
    raise UserError(f"The vocabulary {source.path} is not a SentencePiece model: {HINT}.") from e
  size = len(table)
  special = {piece: i for piece, i in table.items() if model.is_control(i) or model.is_unknown(i)}
  patterns = {piece: re.escape(piece) for piece in special}
  for number, fields in source.added:
    content = fields["content"]
    number = table.get(content) if number is None else number
    if number is None:  # no id is made up
      continue
    table[content] = special[content] = number
    patterns[content] = _pattern(**fields)
  own = {"bos": model.bos_id(), "eos": model.eos_id()}
  bos, eos, adds_bos = _ends(source, table, {key: i if i >= 0 else None for key, i in own.items()}, adds_bos=True)
  # The longest of the tokens that match at a place, as in the tokenizers library.
  cut = re.compile("|".join(patterns[token] for token in sorted(special, key=len, reverse=True)))
  spelling = {i: "" if i in (bos, eos) else token for token, i in special.items()}

  def encode(text):
    ids, end = [], 0
    for match in cut.finditer(text):
      ids += model.encode(text[end : match.start()])
      ids.append(special[match[0]] if match[0] in special else special[match[0].strip()])
      end = match.end()
    return ids + model.encode(text[end:])

  def encode_all(texts):
    ordinary = [cut.search(text) is None for text in texts]
    together = iter(model.encode(list(itertools.compress(texts, ordinary)), num_threads=1))
    return [next(together) if plain else encode(text) for text, plain in zip(texts, ordinary, strict=True)]

  def decode(ids):
    parts = []
    for alone, group in itertools.groupby(ids, key=lambda i: i in spelling or i >= size):
      run = list(group)
      parts.append("".join(spelling.get(i, "") for i in run) if alone else model.decode(run))
    return "".join(parts)

  functions = encode, encode_all, model.encode, decode
  unk = model.unk_id()
  return Tokenizer(source.path, source.digest, *functions, table, bos, eos, unk, adds_bos, size, frozenset(special))


def _pattern(content: str, single_word=False, lstrip=False, rstrip=False, **_unused) -> str:
  """A regular expression of an added token with the white space that it swallows."""
  word = rf"(?<!\w){re.escape(content)}(?!\w)" if single_word else re.escape(content)
  return (r"\s*" if lstrip else "") + word + (r"\s*" if rstrip else "")
