"""Tokenizers as the fields of a GGUF file.

llama.cpp has two that matter here. `llama` is SentencePiece's BPE: of all neighbours that make a token, those whose
token has the highest score are merged first. `gpt2` is byte-level BPE: text is cut by a regular expression that `pre`
names, its bytes are written as 256 letters, and neighbours are merged in the order of a list. Both want a token for
every row of the embedding, all different. Where it has to be: rows without a token are [PAD...], unused.

What a tokenizer's files say beyond that, llama.cpp does not know: `lstrip`, `rstrip` and `single_word` of added tokens,
the Unicode normalisation (NFC) of qwen2's, and that Metaspace puts no space before a text that begins with one.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsparse.data.embedded import check_embedded, check_ids
from tsparse.data.encoding import BYTES, first_token
from tsparse.data.tokenizer import Source, Tokenizer, build_tokenizer, read_tokenizer
from tsparse.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in SentencePiece and in gguf.TokenType
SPACE = "\u2581"  # how SentencePiece writes it
ADDED_SCORE = -1000.0
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> (the regular expression of a tokenizer.json, "" for that of ByteLevel; its ignore_merges)
CUTS = {
  "gpt-2": ("", False),
  "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, True),
  "qwen2": (_WORDS + r"\p{N}" + _REST, False),
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A tokenizer for llama.cpp.

  Attributes:
    model: tokenizer.ggml.model, llama or gpt2.
    pre: how text is cut, for gpt2 a key of CUTS.
    tokens: of every row of the embedding.
    types: of each, as in SentencePiece.
    bos: what a text begins with.
    eos: what a text ends with.
    unk: what cannot be encoded, or None.
    add_bos: whether texts begin with `bos` unless one says otherwise.
    scores: of each token, for llama.
    prefix: whether texts begin with a space, for llama.
    merges: pairs of tokens, "a b", for gpt2.
    template: of chats, "" for none.
  """

  model: str
  pre: str
  tokens: Sequence[str]
  types: Sequence[int]
  bos: int
  eos: int
  unk: int | None
  add_bos: bool = True
  scores: Sequence[float] = ()
  prefix: bool = True
  merges: Sequence[str] = ()
  template: str = ""

  def fields(self) -> dict[str, Any]:
    """Name of an `add_` method of gguf.GGUFWriter -> what it is given."""
    own = {"token_scores": self.scores, "add_space_prefix": self.prefix} if self.model == "llama" else {}
    own |= {"token_merges": self.merges} if self.model == "gpt2" else {}
    own |= {"chat_template": self.template} if self.template else {}
    own |= {} if self.unk is None else {"unk_token_id": self.unk}
    return {
      "tokenizer_model": self.model,
      "tokenizer_pre": self.pre,
      "token_list": self.tokens,
      "token_types": self.types,
      "bos_token_id": self.bos,
      "eos_token_id": self.eos,
      "add_bos_token": self.add_bos,
      "add_eos_token": False,
      **own,
    }


def read_vocabulary(name: str, size: int, bos: str = "auto") -> Vocabulary:
  """The tokenizer that `name` says (data/vocabulary.py), for a model with `size` rows of embeddings whose texts begin
  with BOS as `bos` says (`data.encoding.first_token`).

  Raises:
    UserError: it cannot be read, is larger than that, or is not one that llama.cpp has.
  """
  if name == "bytes":
    return dataclasses.replace(_bytes(size), add_bos=first_token(BYTES, bos) is not None)
  source = read_tokenizer(name)
  tokenizer = build_tokenizer(source)
  check_embedded(tokenizer, size)
  check_ids(tokenizer, size, [tokenizer.bos, tokenizer.eos])
  special = {tokenizer.bos, tokenizer.eos}
  ids = {i: token for token, i in tokenizer.table.items()}
  tokens = [ids.get(i, f"[PAD{i}]") for i in range(size)]
  types = [CONTROL if i in special else NORMAL if i in ids else UNUSED for i in range(size)]
  unk = None if tokenizer.unk is None or tokenizer.unk >= size else tokenizer.unk
  if unk is not None and unk not in special:
    types[unk] = UNKNOWN
  build = _hugging_face if source.is_json else _sentencepiece
  own = build(source, tokenizer, tokens, types)
  if len(set(tokens)) < size or "" in tokens:
    twice = "" if "" in tokens else collections.Counter(tokens).most_common(1)[0][0]
    raise UserError(f"the vocabulary {source.path} has the token {twice!r} twice or empty, and GGUF cannot hold that.")
  named = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": unk}
  named["add_bos"] = first_token(tokenizer, bos) is not None
  return Vocabulary(tokens=tokens, types=types, template=_template(Path(source.path).parent), **named, **own)


def _bytes(size: int) -> Vocabulary:
  """Bytes after three special tokens, as byte-level BPE that merges nothing."""
  check_embedded(BYTES, size)
  # GPT-2's letters: printable Latin-1 characters are themselves, the other bytes follow from U+0100.
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = itertools.count(0x100)
  letters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
  tokens = ["<pad>", "</s>", "<unk>", *letters, *(f"[PAD{i}]" for i in range(259, size))]
  types = [CONTROL] * 3 + [NORMAL] * 256 + [UNUSED] * (size - 259)
  # llama.cpp wants a merge: no text has these two as neighbours, since both are longer than a letter
  return Vocabulary("gpt2", "gpt-2", tokens, types, bos=0, eos=1, unk=2, merges=("<pad> </s>",))


def _sentencepiece(source: Source, tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> dict[str, Any]:
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(source.content)
  spec, normalizer = model.trainer_spec, model.normalizer_spec
  if spec.model_type != spec.BPE or not spec.byte_fallback:
    raise UserError(f"the vocabulary {source.path} is no SentencePiece BPE with bytes, the only one that GGUF has.")
  if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or spec.treat_whitespace_as_suffix:
    raise UserError(f"the vocabulary {source.path} normalises text ({normalizer.name}), which llama.cpp does not.")
  scores = [ADDED_SCORE] * len(tokens)
  for i, piece in enumerate(model.pieces):
    scores[i], types[i] = piece.score, piece.type
  _add_tokens(((tokenizer.table.get(fields["content"]), fields) for _, fields in source.added), tokens, types)
  return {"model": "llama", "pre": "default", "scores": scores, "prefix": normalizer.add_dummy_prefix}


def _add_tokens(added: Iterable[tuple[int | None, Mapping[str, Any]]], tokens: list[str], types: list[int]):
  """Marks added tokens, (id or None, fields of a tokenizers.AddedToken)."""
  for i, fields in added:
    if i is not None and i < len(types) and types[i] not in (CONTROL, UNKNOWN):
      types[i] = CONTROL if fields.get("special") else USER_DEFINED
      if types[i] == USER_DEFINED:
        tokens[i] = tokens[i].replace(SPACE, " ")  # llama.cpp looks for them in the text as it is


def _hugging_face(source: Source, tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> dict[str, Any]:
  fields = json.loads(source.content)
  model = fields["model"]
  if model.get("type") != "BPE":
    raise UserError(f"the vocabulary {source.path} is of type {model.get('type')}, and only BPE can be a GGUF's.")
  merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
  steps = [step for key in ("normalizer", "pre_tokenizer") for step in _steps(fields.get(key))]
  beside = ((tokenizer.table.get(added["content"]), added) for _, added in source.added)
  _add_tokens(itertools.chain(((token["id"], token) for token in fields["added_tokens"]), beside), tokens, types)
  if any(step["type"] == "ByteLevel" for step in steps):
    return {"model": "gpt2", "pre": _cut(source, steps, model), "merges": [" ".join(pair) for pair in merges]}
  prefix = _prefix(steps)
  if not model.get("byte_fallback") or prefix is None:
    kinds = ", ".join(step["type"] for step in steps)
    raise UserError(f"the vocabulary {source.path} prepares text by {kinds or 'nothing'}, as no GGUF tokenizer does.")
  for i, token in enumerate(tokens):
    if len(token) == 6 and token.startswith("<0x") and types[i] == NORMAL:
      types[i] = BYTE
  scores = _scores(source, {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}, merges)
  scores = [scores.get(token, ADDED_SCORE) for token in tokens]
  return {"model": "llama", "pre": "default", "prefix": prefix, "scores": scores}


def _steps(field: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
  """A normalizer or pre-tokenizer as the list of its steps."""
  if field is None:
    return []
  inner = field.get("normalizers", field.get("pretokenizers")) if field["type"] == "Sequence" else None
  return [field] if inner is None else [step for each in inner for step in _steps(each)]


def _cut(source: Source, steps: list[Mapping[str, Any]], model: Mapping[str, Any]) -> str:
  """The key of CUTS of a byte-level tokenizer."""
  steps = [step for step in steps if step["type"] != "NFC"]
  splits = [step for step in steps if step["type"] == "Split"]
  level = steps[-1]
  plain = all(s.get("behavior") == "Isolated" and not s.get("invert") for s in splits) and len(steps) == len(splits) + 1
  pattern = splits[0]["pattern"].get("Regex") if len(splits) == 1 else "" if not splits else None
  found = (pattern, bool(model.get("ignore_merges")))
  if plain and not level.get("add_prefix_space") and level.get("use_regex", True) == (not splits):
    for name, known in CUTS.items():
      if found == known:
        return name
  raise UserError(
    f"the vocabulary {source.path} cuts text in a way that is not known here: only as {', '.join(CUTS)} do, for which "
    "llama.cpp has names."
  )


def _prefix(steps: list[Mapping[str, Any]]) -> bool | None:
  """Whether steps like those of SentencePiece put a space in front of a text; None where they do other things."""
  kinds = [step["type"] for step in steps]
  if kinds in (["Prepend", "Replace"], ["Replace"]):
    known = all(SPACE in (step.get("prepend"), step.get("content")) for step in steps)
    return kinds[0] == "Prepend" if known and steps[-1]["pattern"] == {"String": " "} else None
  if kinds == ["Metaspace"] and steps[0].get("replacement") == SPACE and not steps[0].get("split", True):
    return steps[0].get("prepend_scheme") != "never"
  return None


def _scores(source: Source, normal: Collection[str], merges: list[Sequence[str]]) -> dict[str, float]:
  """Scores by which llama.cpp merges what the list of merges says, in its order.

  A token's is minus the number of tokens that merges make before it. That is the same where all merges that make a
  token stand together, and every two tokens that are one when put together are a merge.

  Args:
    source: of the tokenizer.
    normal: its tokens but for the special ones and those of bytes.
    merges: its merges.

  Raises:
    UserError: it is not the same.
  """
  order = [token for token, _ in itertools.groupby("".join(pair) for pair in merges)]
  pairs = {tuple(pair) for pair in merges}
  halves = ((token[:i], token[i:]) for token in normal for i in range(1, len(token)))
  together = {(left, right) for left, right in halves if left in normal and right in normal}
  if len(set(order)) < len(order) or not together <= pairs:
    raise UserError(
      f"the merges of {source.path} are not those of a SentencePiece model, and GGUF has no other that falls back to "
      "bytes: put tokenizer.model in place of tokenizer.json."
    )
  return {token: -float(i) for i, token in enumerate(order)}


def _template(folder: Path) -> str:
  """The template of chats beside a tokenizer, "" for none."""
  if (folder / "chat_template.jinja").is_file():
    return (folder / "chat_template.jinja").read_text()
  path = folder / "tokenizer_config.json"
  template = json.loads(path.read_text()).get("chat_template") if path.is_file() else None
  if isinstance(template, list):  # several by name
    template = next((each.get("template") for each in template if each.get("name") == "default"), None)
  return template if isinstance(template, str) else ""
