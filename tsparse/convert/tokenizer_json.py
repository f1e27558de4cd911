"""A SentencePiece model as the tokenizer.json that transformers reads: of a lone tokenizer.model it makes other ids.

BPE in the order of the scores, bytes for what is in no piece, a space in front of a text where the model puts one. What
cannot be said so (Unigram, text that is normalised, pieces of users) is left out, and so is what gives other ids.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from tsparse import files
from tsparse.data.encoding import load_tokenizer
from tsparse.data.tokenizer import Tokenizer, read_tokenizer

SPACE = "\u2581"  # how SentencePiece writes it
SAMPLES = 2000  # pieces that both are compared on
ODD = (
  "", " ", "a", " a", "  two  spaces ", "a\n\n\tb\r\n", "\x00\x1b", "naïve 🎉👩‍🚀 漢字 ꙮ", "<0x41>", "▁a ▁",
)  # fmt: skip


def complete_for_transformers(folder: Path):
  """Adds what transformers needs to have the ids of the tokenizer in an exported folder: tokenizer.json made of a lone
  tokenizer.model, with its class, and tokenizer_config.json with BOS and EOS where there is none."""
  tokenizer, path = load_tokenizer(str(folder)), folder / "tokenizer_config.json"
  before = json.loads(path.read_text()) if path.exists() else {}
  fields = dict(before)
  if not (folder / "tokenizer.json").exists():
    made = from_sentencepiece(tokenizer)
    if made is None:
      logging.warning("%s: transformers may make other ids of its tokenizer.model than it was trained for", folder.name)
      return
    files.write(folder / "tokenizer.json", made)
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # LlamaTokenizer would build its own in place of the file
  names = {number: token for token, number in tokenizer.table.items()}
  if not path.exists():
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer.eos]}
    fields |= {"bos_token": names[tokenizer.bos]} if tokenizer.adds_bos else {}
  if fields != before:
    files.write(path, files.to_json(fields))


def from_sentencepiece(tokenizer: Tokenizer) -> str | None:
  """The text of a tokenizer.json with the ids of a SentencePiece model; None where there is none."""
  import tokenizers
  from sentencepiece import sentencepiece_model_pb2
  from tokenizers import decoders, models, normalizers, processors

  source = read_tokenizer(tokenizer.path)
  model = sentencepiece_model_pb2.ModelProto.FromString(source.content)
  spec, normalizer = model.trainer_spec, model.normalizer_spec
  changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or spec.treat_whitespace_as_suffix
  if spec.model_type != spec.BPE or not spec.byte_fallback or changes:
    return None
  pieces = model.pieces
  normal = {piece.piece: (-piece.score, number) for number, piece in enumerate(pieces) if piece.type == piece.NORMAL}
  table = {piece.piece: number for number, piece in enumerate(pieces)}
  unknown = next((piece.piece for piece in pieces if piece.type == piece.UNKNOWN), None)
  bpe = models.BPE(table, list(_merges(normal)), unk_token=unknown, fuse_unk=True, byte_fallback=True)
  made = tokenizers.Tokenizer(bpe)
  prefix = normalizer.add_dummy_prefix
  made.normalizer = normalizers.Sequence([*[normalizers.Prepend(SPACE)] * prefix, normalizers.Replace(" ", SPACE)])
  strip = [decoders.Strip(" ", 1, 0)] * prefix
  made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
  special = [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
  made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
  for _, fields in source.added:
    if fields["content"] in tokenizer.table:
      made.add_tokens([tokenizers.AddedToken(**{"normalized": False} | fields)])
  if tokenizer.adds_bos:
    bos = next(token for token, number in tokenizer.table.items() if number == tokenizer.bos)
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos)])
  step = max(1, len(pieces) // SAMPLES)
  samples = [piece.piece.replace(SPACE, " ") for piece in pieces[::step]]
  texts = [*ODD, *samples, *(by.join(samples[i : i + 20]) for by in ("", " ") for i in range(0, len(samples), 20))]
  same = all(
    list(ours) == theirs.ids
    for ours, theirs in zip(
      tokenizer.encode_all(texts), made.encode_batch(texts, add_special_tokens=False), strict=True
    )
  )
  return made.to_str() if same and made.get_vocab() == dict(tokenizer.table) else None


def _merges(normal: dict[str, Any]) -> Iterator[tuple[str, str]]:
  """Every two pieces that are a third one together, in the order of that one's score."""
  for token in sorted(normal, key=normal.__getitem__):
    halves = ((token[:i], token[i:]) for i in range(1, len(token)))
    yield from (pair for pair in halves if pair[0] in normal and pair[1] in normal)
