"""Conversations: from the lines of a file to ChatML, and to tokens of which only the assistant's count in the loss.

ChatML, the template of Turbo Sparse's models:

  <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n

What an assistant says and its <|im_end|> are scored; headers, other turns, the newlines between turns and the
end-of-text token that `config.data.eos` puts after the conversation are not.

A vocabulary that holds <|im_start|> and <|im_end|> (as TurboSparse-Mistral's does) gives them as its ids. In any other
the markers are spelled out themselves, and a message that spells one is malformed. What people say is text: a message
that spells a special token of the vocabulary, those two or <|endoftext|> or </s>, is encoded as the letters it is, so
that it cannot forge a turn or the end of a text. Generation has the same ids (`prompt_ids`): those of the conversation
up to where the assistant's answer begins.

The share of such a source in a mixture is of all tokens drawn, like that of any other; its loss is of the scored ones.
A conversation that a row's end or its own length cuts goes on as a document would, with its mask.
"""

import bisect
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tsparse.data.encoding import Encoder, make_encoder
from tsparse.data.tokenizer import Tokenizer
from tsparse.errors import UserError

PREFIX = "chat:"  # of a D whose files hold conversations
START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
FIELDS = ("messages", "instruction", "input", "output")
WANTED = (
  'a conversation is {"messages": [{"role": ..., "content": ...}, ...]} or {"instruction": ..., "input": ..., '
  '"output": ...}'
)
ENCODING = 2  # of the ids that conversations have: part of what a saved position and a cache are told apart by
BEFORE = "."  # stands before text that goes on while it is encoded


@dataclasses.dataclass(frozen=True)
class Chat:
  """Says of a file that its lines are conversations, where other files name a text field.

  Attributes:
    spelled: whether markers will be text like any other, so that no message may hold one.
  """

  spelled: bool

  def text_of(self, record: Any, place: str) -> bytes | UserError:
    """The conversation of a line or row in one form, [[role, content], ...] as JSON, or what is wrong with it."""
    try:
      turns = _turns(record)
      if self.spelled:
        _refuse_markers(turns)
      return json.dumps(turns, ensure_ascii=False).encode()
    except _Malformed as e:
      return UserError(f"{place} {e}; mend or leave out the line.")
    except UnicodeEncodeError:
      return UserError(f"{place} is not valid Unicode (a lone surrogate); mend or leave out the line.")


class _Malformed(ValueError):
  pass


def _turns(record: Any) -> list[tuple[str, str]]:
  if not isinstance(record, Mapping):
    raise _Malformed(f"is a {type(record).__name__}: {WANTED}")
  held = [field for field in FIELDS if record.get(field) is not None]
  if held and held[0] == "messages":
    if len(held) > 1:
      raise _Malformed(f"has both messages and {', '.join(held[1:])}, and which is the conversation is not clear")
    turns = _messages(record["messages"])
  elif "instruction" in held and "output" in held:
    for field in held:
      if not isinstance(record[field], str):
        raise _Malformed(f'has a {type(record[field]).__name__} in "{field}" where text belongs')
    parts = [record["instruction"], record.get("input") or ""]
    turns = [("user", "\n\n".join(filter(None, parts))), ("assistant", record["output"])]
  else:
    raise _Malformed(f"is no conversation (fields {', '.join(record) or 'none'}): {WANTED}")
  if not any(role == "assistant" for role, _ in turns):
    raise _Malformed("has no assistant turn, so that nothing of it could be learnt")
  return turns


def _messages(messages: Any) -> list[tuple[str, str]]:
  if not isinstance(messages, list):
    raise _Malformed(f'has a {type(messages).__name__} in "messages" where a list belongs')
  turns = []
  for number, message in enumerate(messages, start=1):
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
      raise _Malformed(f'has a message {number} without "role" and "content": {WANTED}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
      raise _Malformed(f"has the role {role!r} in message {number}, which is none of {', '.join(ROLES)}")
    if not isinstance(content, str):
      raise _Malformed(f"has a {type(content).__name__} as the content of message {number} where text belongs")
    turns.append((role, content))
  return turns


def _refuse_markers(turns: list[tuple[str, str]]):
  for _, content in turns:
    for marker in (START, END):
      if marker in content:
        raise _Malformed(
          f"has {marker} in a message, which the vocabulary has no id for, so that it could not be told from the end "
          "of a turn"
        )


def hint(record: Any) -> str:
  """What to do with a record in which text was looked for, where it is a conversation."""
  found = isinstance(record, Mapping) and ("messages" in record or {"instruction", "output"} <= set(record))
  return f" Conversations are named {PREFIX}FILE." if found else ""


def has_markers(tokenizer: Tokenizer) -> bool:
  """Whether a vocabulary has ids for both markers."""
  return START in tokenizer.table and END in tokenizer.table


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> list[int]:
  """The ids of (role, content) `turns` and of the header of the assistant's turn after them: what precedes an answer.

  They are those that training has before such an answer, without the BOS that documents may begin with.

  Raises:
    UserError: a message spells a marker for which the vocabulary has no id.
  """
  if not has_markers(tokenizer):
    try:
      _refuse_markers(turns)
    except _Malformed as e:
      raise UserError(f"The conversation {e}; write it without.") from None
  encoder = ChatEncoder(tokenizer, make_encoder(tokenizer, False, 0))
  conversation, place, ids = encoder.conversation(turns, answered=False), 0, []
  while place < len(conversation):
    tokens, _, place = encoder.piece(conversation, place)
    ids += tokens.tolist()
  return ids


class Turn(NamedTuple):
  """A turn as text: what opens it, and what is said, None where that is still to come; `scored` says whether the latter
  counts in the loss."""

  header: str
  body: str | None
  scored: bool

  @property
  def size(self) -> int:
    """Of what there is of it, see `Conversation`."""
    return len(self.header) + (0 if self.body is None else len(self.body) + 1)


class Conversation:
  """Turns end to end. A place in it is a number of characters; a turn has one more, of what closes it."""

  def __init__(self, turns: list[Turn]):
    self.turns = turns
    self.ends = list(itertools.accumulate(turn.size for turn in turns))

  def __len__(self) -> int:
    return self.ends[-1]


class ChatEncoder:
  """Tokens and loss mask of conversations: what `encoding.Encoder` is to documents.

  The tokens are those of the whole ChatML text, but for the ends of what the assistant says: no token there holds
  characters of both sides, so that what is scored is what is said.
  """

  def __init__(self, tokenizer: Tokenizer, encoder: Encoder):
    """`encoder` says how long pieces are, and whether conversations end with an end-of-text token."""
    self._ids = {marker: tokenizer.table[marker] for marker in (START, END)} if has_markers(tokenizer) else {}
    self._spell = tokenizer.spell
    self._inside = _inside(tokenizer)
    self._eos, self._size = encoder.eos, encoder.size
    self._first = dataclasses.replace(encoder, encode=self._ordinary, eos=None, own_space=False)
    self._further = dataclasses.replace(self._first, encode=self._after)
    self._before = list(tokenizer.spell(BEFORE))
    self._newline = self._ordinary("\n") if self._ids else self._after("\n")

  def open(self, text: str) -> Conversation:
    """A conversation from what `Chat.text_of` made of it."""
    return self.conversation(json.loads(text))

  def conversation(self, turns: Sequence[tuple[str, str]], answered: bool = True) -> Conversation:
    """A conversation of (role, content); unless `answered`, an assistant's turn of which nothing is said comes last."""
    start, end = ("", "") if self._ids else (START, END)
    made = [Turn(f"{start}{role}\n", content + end, role == "assistant") for role, content in turns]
    return Conversation(made if answered else [*made, Turn(f"{start}assistant\n", None, False)])

  def first_pieces(self, conversations: Sequence[Conversation]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """`piece(conversation, 0)` of each."""
    return [self.piece(conversation, 0) for conversation in conversations]

  def piece(self, conversation: Conversation, start: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and loss mask, int32 [n], of the piece from `start`, and where the next begins; see `Encoder.piece`.

    A piece is as many turns as take `size` characters, and at most twice that: the last may be cut.
    """
    tokens, mask, end = [], [], start

    def add(ids, scored):
      tokens.extend(ids)
      mask.extend([int(scored)] * len(ids))

    while end < len(conversation) and end - start < self._size:
      number = bisect.bisect_right(conversation.ends, end)
      header, body, scored = conversation.turns[number]
      begin = conversation.ends[number - 1] if number else 0
      if end == begin:
        add([self._ids[START]] if self._ids else [], False)
      encoder = self._first if end == begin and (self._ids or number == 0) else self._further
      if body is None:
        said, place = encoder.encode(header), len(header)
      elif end == begin and scored:
        opening, said, place = self._opened(encoder, header, body)
        add(opening, False)
      else:
        said, _, place = encoder.piece(header + body, end - begin)
      add(said, scored)
      end = begin + place
      if body is not None and place == len(header) + len(body):
        add([self._ids[END]] if self._ids else [], scored)
        add(self._newline, False)
        end += 1
    if end == len(conversation) and self._eos is not None:
      add([self._eos], False)
    return np.asarray(tokens, np.int32), np.asarray(mask, np.int32), end

  def _opened(self, encoder: Encoder, header: str, body: str) -> tuple[list[int], np.ndarray, int]:
    """Tokens of the header and of what of the body fits a piece, and the place in header + body behind it."""
    opening = list(encoder.encode(header))
    whole, _, place = encoder.piece(header + body, 0)
    if whole[: len(opening)].tolist() == opening and place >= len(header):
      return opening, whole[len(opening) :], place
    said, _, place = self._further.piece(body, 0)  # a token would hold some of both
    return opening, said, len(header) + place

  def _ordinary(self, text: str) -> list[int]:
    """Tokens of text in which no special token is read."""
    first, *others = self._inside.split(text) if self._inside else [text]
    return sum(map(self._continued, others), list(self._spell(first)))

  def _after(self, text: str) -> list[int]:
    """The same of text that goes on after other text: without the space that SentencePiece puts before a text."""
    return sum(map(self._continued, self._inside.split(text) if self._inside else [text]), [])

  def _continued(self, text: str) -> list[int]:
    whole, size = list(self._spell(BEFORE + text)), len(self._before)
    return whole[size:] if whole[:size] == self._before else list(self._spell(text))


def _inside(tokenizer: Tokenizer) -> re.Pattern | None:
  """The places in a text, after the first character of a special token, at which it is cut so that no such token is
  read; None where `spell` reads none: a SentencePiece model does read pieces that are declared as user-defined, and
  Unigram any that has a score."""
  tokens = {*tokenizer.special, *((START, END) if has_markers(tokenizer) else ())}
  read = sorted(t for t in tokens if len(t) > 1 and tokenizer.table[t] in list(tokenizer.spell(t)))
  return re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in read)) if read else None
