"""Vocabularies: bytes, or a SentencePiece model file."""

import functools
import os
import zlib

from tsparse.data.tensorflow import load_tensorflow, silent_stderr
from tsparse.errors import UserError


def load_vocabulary(name: str):
  """The `seqio.Vocabulary` of `name`: `"bytes"` or the path of a SentencePiece `.model` file.

  Bytes have 259 ids: pad 0, EOS 1, unknown 2 (unused), and byte b is b + 3.

  Raises:
    UserError: the file is missing, unreadable, not a SentencePiece model, or has no EOS.
  """
  return _byte_vocabulary() if name == "bytes" else _sentencepiece_vocabulary(name, vocabulary_digest(name))


def vocabulary_digest(name: str) -> str:
  """A short key of the vocabulary's content: equal for copies of one SentencePiece model."""
  if name == "bytes":
    return name
  try:
    with open(name, "rb") as f:
      return f"{zlib.crc32(f.read()):08x}"
  except OSError as e:
    hint = 'name "bytes" or the path of a SentencePiece .model file'
    raise UserError(f"config.data.vocabulary {name!r} cannot be read ({e.strerror}): {hint}.") from e


def bos_id(vocabulary) -> int:
  """The id a document begins with: the tokenizer's BOS, or the pad id 0 (seqio's convention) where it has none."""
  bos = vocabulary.bos_id
  return bos if bos is not None and bos >= 0 else vocabulary.pad_id


def same_vocabulary(a, b) -> bool:
  """Whether two seqio vocabularies give the same ids (seqio's own `==` compares the paths of SentencePiece models)."""
  if a == b:
    return True
  models = [getattr(v, "sp_model", None) for v in (a, b)]
  return models[0] is not None and models[0] == models[1] and a.vocab_size == b.vocab_size


@functools.cache
def _byte_vocabulary():
  seqio, _ = load_tensorflow()
  return seqio.ByteVocabulary()


@functools.lru_cache(maxsize=8)
def _sentencepiece_vocabulary(path: str, _digest: str):
  import sentencepiece  # here, so that importing this module stays light

  try:
    sentencepiece.SentencePieceProcessor(model_file=path)
  except (OSError, RuntimeError) as e:
    raise UserError(f"The vocabulary {path} is not a SentencePiece model; name a .model file or 'bytes'.") from e
  seqio, _ = load_tensorflow()
  vocabulary = seqio.SentencePieceVocabulary(os.path.abspath(path), extra_ids=0)
  with silent_stderr():  # seqio warns of a pad id other than 0; nothing here writes pad ids into text
    vocabulary.load_model()
  if vocabulary.eos_id < 0:
    raise UserError(f"The vocabulary {path} has no EOS to end documents with; train the model with an eos_id.")
  return vocabulary
