"""`config.data`: what the data is and how it is read."""

import dataclasses
from typing import Any

from tsparse.errors import UserError

DEFAULT_LANES = 8


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The fields of `config.data`; `configs/default.py` sets them.

  Attributes:
    train: D to train on: a file or folder, or the name of a task or mixture.
    validation: D for the loss on held-out text, or "" for what `train` holds out.
    mixture: "name:weight,name:weight" of D's, in place of `train`.
    allow_overlap: share of the held-out documents that may be trained on too; more is an error.
    root: folder or bucket that the sources of a mixture lie in, and that other relative paths may be relative to.
    allow_missing: sources of a mixture that are not there are left out and the other weights renormalised.
    text_field: of .jsonl and .parquet files, unless a mixture says another.
    skip_bad: so many malformed lines of a D are left out and counted; one more is an error.
    cache: folder for unpacked files and indices; "" for TSPARSE_CACHE or ~/.cache/tsparse.
    cached: folder of seqio's cache job, whose tokens are trained on in place of encoding the text; "" for none.
    lanes: S, how many independent readers make a batch; see `lanes_of`.
    vocabulary: see `tsparse.data.tokenizer.load_tokenizer`.
    bos: whether documents begin with the tokenizer's BOS, "on" or "off", or "auto": as the tokenizer does; see
      `encoding.first_token`.
    eos: whether documents end with an end-of-text token, to be predicted like the others.
    embedded: rows of the embedding of the model that reads the data: text that needs an id beyond them is refused; 0
      where there is no model.
  """

  train: str = "stdlib"
  validation: str = ""
  mixture: str = ""
  allow_overlap: float = 0.01
  root: str = ""
  allow_missing: bool = False
  text_field: str = "text"
  skip_bad: int = 0
  cache: str = ""
  cached: str = ""
  lanes: int = DEFAULT_LANES
  vocabulary: str = "bytes"
  bos: str = "auto"
  eos: bool = True
  embedded: int = 0


def lanes_of(batch_size: int, lanes: int) -> int:
  """The lanes that make a batch: `lanes`, or the largest number below it that divides the rows of the batch.

  Hosts need not divide them: a lane is read by every host that needs rows of it.

  Raises:
    UserError: `lanes` is below 1.
  """
  if lanes < 1:
    raise UserError(f"config.data.lanes is {lanes}; it must be at least 1.")
  return max(n for n in range(1, min(lanes, batch_size) + 1) if batch_size % n == 0)


def data_settings(data: Any, **others: Any) -> DataSettings:
  """Of a `config.data`, or of any object with some of its fields, and of `others`; the rest have their defaults."""
  names = [field.name for field in dataclasses.fields(DataSettings)]
  return DataSettings(**{name: getattr(data, name) for name in names if hasattr(data, name)} | others)
