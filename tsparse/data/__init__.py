"""Data: files, the standard library or seqio tasks in; packed int32 batches with a saved position out.

TensorFlow and seqio are imported when a seqio task is first met, not by this package, and not for files.
"""

from tsparse.data.accounting import account_metrics, accounts_at, merge_positions
from tsparse.data.embedded import check_embedded
from tsparse.data.encoding import BOS, first_token, load_tokenizer, same_tokenizer
from tsparse.data.iterator import (
  EvaluationSet,
  NoText,
  TrainIterator,
  check_data,
  evaluation_batches,
  evaluation_by_source,
  train_iterator,
)
from tsparse.data.leakage import Leakage, check_disjoint
from tsparse.data.packing import Packer, Piece
from tsparse.data.resolve import describe
from tsparse.data.settings import DataSettings, data_settings, lanes_of
from tsparse.data.vocabulary import bos_id, load_vocabulary, same_vocabulary

__all__ = [
  "BOS",
  "DataSettings",
  "EvaluationSet",
  "Leakage",
  "NoText",
  "Packer",
  "Piece",
  "TrainIterator",
  "account_metrics",
  "accounts_at",
  "bos_id",
  "check_data",
  "check_disjoint",
  "check_embedded",
  "data_settings",
  "describe",
  "evaluation_batches",
  "evaluation_by_source",
  "first_token",
  "lanes_of",
  "load_tokenizer",
  "load_vocabulary",
  "merge_positions",
  "same_tokenizer",
  "same_vocabulary",
  "train_iterator",
]
