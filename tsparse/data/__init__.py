"""Data: files, the standard library or seqio tasks in; packed int32 batches with a saved position out.

TensorFlow and seqio are imported at the first use of a function, not by this package.
"""

from tsparse.data.iterator import EvaluationSet, TrainIterator, check_data, evaluation_batches, train_iterator
from tsparse.data.packing import Packer
from tsparse.data.vocabulary import bos_id, load_vocabulary, same_vocabulary

__all__ = [
  "EvaluationSet",
  "Packer",
  "TrainIterator",
  "bos_id",
  "check_data",
  "evaluation_batches",
  "load_vocabulary",
  "same_vocabulary",
  "train_iterator",
]
