"""Text to tokens without TensorFlow: any tokenizer by name, and documents of any length in pieces."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from tsparse.data.tokenizer import Tokenizer, build_tokenizer, read_tokenizer
from tsparse.errors import UserError

# Characters that are encoded at once: what a tokenizer needs in memory and time grows with them. At least so many, and
# for each token of a row, so that the rows of long contexts can be filled by one document.
PIECE, PIECE_PER_TOKEN = 8192, 16
BOS = ("auto", "on", "off")  # `config.data.bos`
SPACE = re.compile(r"(?<=\w) (?=\w)")


def _bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3


def _text(ids: Sequence[int]) -> str:
  """What bytes say; U+FFFD stands for what is no character, as in the decoders of tokenizers and transformers."""
  return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


BYTES = Tokenizer(
  path="bytes",
  digest="bytes",
  encode=_bytes,
  encode_all=lambda texts: list(map(_bytes, texts)),
  spell=_bytes,
  decode=_text,
  table={"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{b:02X}>": b + 3 for b in range(256)},
  bos=0,
  eos=1,
  unk=2,
)


def load_tokenizer(name: str) -> Tokenizer:
  """The tokenizer of `config.data.vocabulary`; the seqio vocabulary of that name gives the same ids.

  Args:
    name: see `tsparse.data.vocabulary.load_vocabulary`.

  Raises:
    UserError: the file is missing, unreadable or not of its kind, or has no EOS.
  """
  if name == "bytes":
    return BYTES
  source = read_tokenizer(name)
  return _built(name, source.digest, source.adds_bos)


@functools.lru_cache(maxsize=8)
def _built(name: str, *_content) -> Tokenizer:
  return build_tokenizer(read_tokenizer(name))


def first_token(tokenizer: Tokenizer, bos: str) -> int | None:
  """The id that a text begins with: BOS, or None where it begins with its own first token.

  Args:
    tokenizer: of the text.
    bos: `config.data.bos`: "on" and "off", or "auto" for what the tokenizer does by transformers' rules. A tokenizer
      without a BOS has EOS in its place where that is "on".

  Raises:
    UserError: `bos` is none of these.
  """
  if bos not in BOS:
    raise UserError(f"config.data.bos is {bos!r}: set it to {', '.join(BOS)}, of which auto is as the tokenizer does.")
  return tokenizer.bos if bos == "on" or (bos == "auto" and tokenizer.adds_bos) else None


def tokenizer_digest(name: str) -> str:
  """A short key of the tokenizer's content: equal for copies of one and what the files beside it add."""
  return name if name == "bytes" else read_tokenizer(name).digest


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
  """Whether two tokenizers mean the same by every id, be they a SentencePiece model and its tokenizer.json."""
  return a.digest == b.digest or (a.eos == b.eos and a.table == b.table)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Tokens of documents, a piece of at most `size` characters at a time.

  Pieces are cut at a space between two words of their second half, and their tokens laid end to end are those of the
  whole text, as far as a tokenizer never joins words (SentencePiece and byte-level BPE models of text do not). Text
  without such a space is cut where the piece is full: there the tokens differ from those of the whole text, and a
  SentencePiece model that puts a space before every text puts one there; no character is lost.

  Attributes:
    encode: text -> ids, without BOS and EOS.
    encode_all: the same of several texts.
    eos: the id that ends a document, or None where it has none.
    own_space: whether `encode` puts a space before its text, so that the one at a cut must be left out.
    size: characters of a piece.
  """

  encode: Callable[[str], Sequence[int]]
  encode_all: Callable[[Sequence[str]], Sequence[Sequence[int]]]
  eos: int | None
  own_space: bool
  size: int

  def open(self, text: str) -> str:
    """What `piece` takes, of a document as it is read: the text itself."""
    return text

  def first_pieces(self, texts: Sequence[str]) -> list[tuple[np.ndarray, None, int]]:
    """`piece(text, 0)` of each of `texts`, those that are one piece encoded in one call."""
    whole = iter(self.encode_all([text for text in texts if len(text) <= self.size]))
    return [
      (self._ended(next(whole)), None, len(text)) if len(text) <= self.size else self.piece(text, 0) for text in texts
    ]

  def piece(self, text: str, start: int) -> tuple[np.ndarray, None, int]:
    """The tokens, int32 [n], of the piece of `text` from `start`, and where the next begins; EOS is after the last.

    Between them is the loss mask: None, all tokens count (`chat.ChatEncoder` has others).
    """
    end = start + self.size
    if end >= len(text):
      return self._ended(self.encode(text[start:] if start else text)), None, len(text)
    cut = next((m.start() for m in SPACE.finditer(text, start + self.size // 2, end)), None)
    ids = np.asarray(self.encode(text[start : end if cut is None else cut]), np.int32)
    return ids, None, end if cut is None else cut + self.own_space

  def _ended(self, ids: Sequence[int]) -> np.ndarray:
    tokens = np.empty(len(ids) + (self.eos is not None), np.int32)
    tokens[: len(ids)] = ids
    if self.eos is not None:
      tokens[-1] = self.eos
    return tokens


def make_encoder(tokenizer: Tokenizer, eos: bool, seq_len: int) -> Encoder:
  """The encoder of `config.data.vocabulary` and `config.data.eos`, for rows of `seq_len` tokens."""
  whole, words = list(tokenizer.encode("a b")), [list(tokenizer.encode(word)) for word in ("a", "b", " b")]
  own_space = whole == words[0] + words[1] and whole != words[0] + words[2]
  size = max(PIECE, PIECE_PER_TOKEN * seq_len)
  return Encoder(tokenizer.encode, tokenizer.encode_all, tokenizer.eos if eos else None, own_space, size)
