"""Ids of a tokenizer and rows of a model's embedding, of which there may be more or fewer than ids.

As in transformers, tokens that were added beyond the rows (a `[PAD]` of added_tokens.json) do no harm while no text
holds them, and there may be rows without a token, which pad the embedding to a round size. An id without a row must
never reach a model, though: JAX clamps an index that is out of range without a word.
"""

import functools
from collections.abc import Sequence

import numpy as np
from absl import logging

from tsparse.data.tokenizer import Tokenizer
from tsparse.errors import UserError

NAMED = 5  # tokens that a warning names at most


def check_embedded(tokenizer: Tokenizer, rows: int):
  """Warns, once in a process, of tokens beyond the `rows` of a model's embedding.

  Raises:
    UserError: the tokenizer's own vocabulary, without the tokens added to it, has more ids than the model rows.
  """
  own = tokenizer.size if tokenizer.own_size is None else tokenizer.own_size
  if own > rows:
    raise UserError(
      f"The vocabulary {tokenizer.path!r} has {own} ids and the model embeds {rows}: it is another model's; name the "
      f"model's own tokenizer, or for a model that is trained from the start set --config.model.vocab_size={own}."
    )
  beyond = sorted((number, token) for token, number in tokenizer.table.items() if number >= rows)
  if beyond:
    named = ", ".join(f"{token!r} ({number})" for number, token in beyond[:NAMED])
    more = f" and {len(beyond) - NAMED} more" if len(beyond) > NAMED else ""
    _warn(
      f"The vocabulary {tokenizer.path} has tokens beyond the {rows} rows of the model's embedding: {named}{more}. "
      "Text that holds one of them is refused."
    )


@functools.cache
def _warn(sentence: str):
  logging.warning("%s", sentence)


def check_ids(tokenizer: Tokenizer, rows: int, ids: Sequence[int]):
  """Raises UserError, which names the token, where one of `ids` is not among the `rows` of the model's embedding."""
  ids = np.asarray(ids)
  if not ids.size or ids.max() < rows:
    return
  unknown = int(ids[ids >= rows][0])
  token = next((token for token, number in tokenizer.table.items() if number == unknown), "")
  raise UserError(
    f"The text needs the token {token!r}, id {unknown} of the vocabulary {tokenizer.path}, and the model's embedding "
    f"has only {rows} rows: leave that token out of the text, or give the model a row for it."
  )


def without_token(tokenizer: Tokenizer, rows: int) -> np.ndarray | None:
  """Which of the `rows` of a model's embedding have no token, bool [V]; None where all have one."""
  found = np.ones(rows, bool)
  ids = np.fromiter(tokenizer.table.values(), np.int64)
  found[ids[ids < rows]] = False
  return found if found.any() else None
