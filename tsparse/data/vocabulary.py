"""Vocabularies that seqio tasks, generation and evaluation share: bytes, SentencePiece, Hugging Face tokenizer.json."""

import functools

import numpy as np

from tsparse.data.encoding import load_tokenizer, tokenizer_digest
from tsparse.data.tensorflow import load_tensorflow
from tsparse.data.tokenizer import Tokenizer


def load_vocabulary(name: str):
  """The `seqio.Vocabulary` of `name`; what its ids are and which is BOS and EOS: see `tsparse.data.tokenizer`.

  Bytes have 259 ids: pad 0, EOS 1, unknown 2 (unused), and byte b is b + 3.

  Args:
    name: `"bytes"`, the path of a SentencePiece `.model` file or of a Hugging Face `tokenizer.json`, or a folder that
      holds `tokenizer.json` (taken where both are there, as transformers does) or `tokenizer.model`.

  Raises:
    UserError: the file is missing, unreadable or not of its kind, or has no EOS.
  """
  return _byte_vocabulary() if name == "bytes" else _tokenizer_vocabulary(name, tokenizer_digest(name))


def bos_id(vocabulary) -> int:
  """The id a document begins with: the tokenizer's BOS or, without one, its EOS; the pad id 0 (seqio's) for bytes."""
  bos = vocabulary.bos_id
  return bos if bos is not None and bos >= 0 else vocabulary.pad_id


def same_vocabulary(a, b) -> bool:
  """Whether two seqio vocabularies mean the same by every id, be they a SentencePiece model and its tokenizer.json.

  seqio's own `==` compares the paths of SentencePiece models.
  """
  return a == b or (a.eos_id == b.eos_id and _table(a) is not None and _table(a) == _table(b))


def _table(vocabulary) -> dict[str, int] | None:
  """{token: id}; None where the vocabulary has no such table."""
  if hasattr(vocabulary, "sp_model"):  # of a user's seqio.SentencePieceVocabulary
    return {vocabulary.tokenizer.id_to_piece(i): i for i in range(vocabulary.vocab_size)}
  return getattr(getattr(vocabulary, "tokenizer", None), "table", None)


@functools.cache
def _byte_vocabulary():
  seqio, _ = load_tensorflow()
  return seqio.ByteVocabulary()


@functools.lru_cache(maxsize=8)
def _tokenizer_vocabulary(name: str, _digest: str):
  return _vocabulary_class()(load_tokenizer(name))


@functools.cache
def _vocabulary_class():
  seqio, tf = load_tensorflow()

  class TokenizerVocabulary(seqio.Vocabulary):
    """A `tsparse.data.tokenizer.Tokenizer` as seqio wants it. The pad id is seqio's 0: no text holds padding."""

    def __init__(self, tokenizer: Tokenizer):
      super().__init__()
      self.tokenizer = tokenizer

    bos_id = property(lambda self: self.tokenizer.bos)
    eos_id = property(lambda self: self.tokenizer.eos)
    unk_id = property(lambda self: self.tokenizer.unk)
    _base_vocab_size = property(lambda self: self.tokenizer.size)

    def _encode(self, s):
      return self.tokenizer.encode(s)

    def _decode(self, ids):
      return self.tokenizer.decode([int(i) for i in ids])

    def _encode_tf(self, s):
      def encode(text):  # bytes in a graph, an array of them in eager mode
        text = np.array(text, object).item().decode("utf-8", "replace")  # U+FFFD, as SentencePiece's own kernel has it
        return np.array(self.tokenizer.encode(text), np.int32)

      # stateless: encoding is pure, and a stateful function could not be checkpointed
      return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

    def decode_tf(self, ids):
      if ids.shape.rank == 2:
        return tf.map_fn(self.decode_tf, ids, fn_output_signature=tf.string)
      return tf.numpy_function(lambda i: self.decode(i.tolist()).encode(), [ids], tf.string, stateful=False)

    _decode_tf = decode_tf

    def __eq__(self, other):
      return isinstance(other, TokenizerVocabulary) and self.tokenizer.digest == other.tokenizer.digest

    def __str__(self):
      return f"{self.tokenizer.path} ({self.tokenizer.digest})"

  return TokenizerVocabulary
