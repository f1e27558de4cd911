"""Text around generation: the ids of a prompt, what ends a text, and text as it streams."""

import json
from collections.abc import Sequence
from pathlib import Path

from tsparse.data.chat import END, prompt_ids
from tsparse.data.tokenizer import Tokenizer
from tsparse.errors import UserError

HALF = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet


def encode_prompt(
  tokenizer: Tokenizer, prompt: str, bos: int | None, chat: bool = False, system: str = ""
) -> list[int]:
  """Ids of a prompt, or of a chat up to its answer, after `bos` (`data.encoding.first_token`) where there is one.

  Raises:
    UserError: the prompt is empty, or a chat's spells what the vocabulary has no id for (`chat.prompt_ids`).
  """
  if not prompt.strip():
    raise UserError("the prompt is empty: give some text to go on from.")
  turns = [("system", system)] * bool(system) + [("user", prompt)]
  ids = prompt_ids(tokenizer, turns) if chat else list(tokenizer.encode(prompt))
  if not ids:
    raise UserError(f"the prompt {prompt!r} has no token in the vocabulary {tokenizer.path}: give another.")
  return ids if bos is None else [bos, *ids]


def stop_tokens(tokenizer: Tokenizer, folder: Path, names: Sequence[str], chat: bool) -> set[int]:
  """The ids that end a text: EOS, those of the model's generation_config.json, and the tokens `names`.

  A name is a token as the tokenizer spells it (`</s>`), or text that is one token.

  Raises:
    UserError: the tokenizer has no such token, or generation_config.json is damaged.
  """

  def id_of(name: str) -> int:
    ids = [tokenizer.table[name]] if name in tokenizer.table else list(tokenizer.encode(name))
    if len(ids) != 1 or ids == [tokenizer.unk]:
      raise UserError(
        f"--stop_token={name}: the tokenizer {tokenizer.path} has no such token; text that is several tokens is given "
        "as --stop."
      )
    return ids[0]

  names = [*names, END] if chat and END in tokenizer.table else names
  path = folder / "generation_config.json"
  try:
    listed = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f"{path} cannot be read ({error}): fetch it again, or take it away.") from None
  listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
  return {tokenizer.eos, *listed, *map(id_of, names)}


class Stream:
  """The text of one row as its tokens come.

  Attributes:
    text: all of it so far, without the stop string that ended it.
    stopped: whether a stop string came.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
    self.text, self.stopped = "", False
    self._decode, self._stops, self._ids, self._given = tokenizer.decode, stops, list(prompt), 0
    self._before = len(self._decode(self._ids))

  def add(self, token: int) -> str:
    """Takes a token; returns the text that is certain by now and was not returned before."""
    self._ids.append(token)
    self.text = self._decode(self._ids)[self._before :]
    found = [at for at in (self.text.find(stop) for stop in self._stops) if at >= 0]
    if found:
      self.text, self.stopped = self.text[: min(found)], True
      return self.rest()
    return self._upto(len(self.text) - self._doubtful())

  def rest(self) -> str:
    """What `add` still held back, at the end."""
    return self._upto(len(self.text))

  def _upto(self, end: int) -> str:
    start, self._given = self._given, max(self._given, end)
    return self.text[start : self._given]

  def _doubtful(self) -> int:
    """Characters at the end that may yet change: half a character, or the beginning of a stop string."""
    halves = len(self.text) - len(self.text.rstrip(HALF))
    begun = [n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
    return max([halves, *begun])
