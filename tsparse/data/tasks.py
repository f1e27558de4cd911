"""What a D names: a file or folder, one of our stdlib tasks, or anything in seqio's registry.

Everything becomes a seqio Task or Mixture of one int32 feature `targets`, ending in EOS.
"""

import difflib
import functools
import os
import sys
import zlib
from collections.abc import Mapping

import numpy as np

from tsparse.data import stdlib
from tsparse.data.sources import SUFFIXES, Documents, held_out_splits, read_documents
from tsparse.data.tensorflow import load_tensorflow
from tsparse.data.vocabulary import load_vocabulary, same_vocabulary, vocabulary_digest
from tsparse.errors import UserError

PREFIX = "tsparse."  # of our names in seqio's process-wide registry
READ_AT_ONCE = 16  # documents per call into Python: a call costs about 0.2 ms, as much as ten reads


def own_documents(name: str) -> dict[str, dict[str, Documents]] | None:
  """The documents of a D of ours as {task: {split: Documents}}; None where D is in seqio's registry.

  Raises:
    UserError: D is unknown, or its files cannot be read.
  """
  if name in stdlib.TASKS:
    folder = stdlib.extracted()
    splits = ("train", "validation")
    return {t: {s: read_documents(str(folder / f"{t}.{s}.jsonl")) for s in splits} for t in stdlib.TASKS[name]}
  if name in _registered():
    return None
  if name and (os.path.exists(os.path.expanduser(name)) or name.endswith(SUFFIXES)):
    return {"files": held_out_splits(read_documents(name))}
  known = [*stdlib.TASKS, *_registered()]
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {nearest[0]!r}? " if nearest else ""
  raise UserError(
    f"Unknown data {name!r}: {hint}name a .jsonl or .txt file, a folder of them, or a seqio task ({', '.join(known)})."
  )


def check_split(name: str, split: str):
  """Raises UserError where D has no documents in `split`."""
  own = own_documents(name)
  if own is None:
    seqio, _ = load_tensorflow()
    splits = sorted(seqio.get_mixture_or_task(name).splits)
  else:
    splits = list(next(iter(own.values())))
  if split in splits:
    return
  if own is not None and "all" in splits:
    n = len(own["files"]["all"])
    raise UserError(
      f"Cannot hold out validation documents of {name}: it has only {n} document(s), "
      "and one in 20 is held out by the crc32 of its text; set data.validation to a file of its own."
    )
  raise UserError(
    f"The data {name!r} has no split {split!r}, only {', '.join(splits)}; set data.validation to another."
  )


def provider(name: str, vocabulary: str):
  """The seqio Task or Mixture of D, registered on first use under a name unique to its content and the vocabulary.

  Raises:
    UserError: D is unknown or unreadable, or a task of the user's has other features or another vocabulary.
  """
  seqio, _ = load_tensorflow()
  own = own_documents(name)
  if own is None:
    return _user_provider(name, vocabulary)
  tasks = [_task(task, splits, vocabulary) for task, splits in own.items()]
  if len(tasks) == 1:
    return tasks[0]
  mixture = PREFIX + "mixture." + _digest("".join(t.name for t in tasks))
  if mixture not in seqio.MixtureRegistry.names():
    # Without stop_on_empty_dataset an epoch (evaluation) holds every document of every task.
    sample = functools.partial(_tf().data.Dataset.sample_from_datasets, stop_on_empty_dataset=False)
    rates = [(t.name, stdlib.RATES[task]) for t, task in zip(tasks, own, strict=True)]
    seqio.MixtureRegistry.add(mixture, rates, sample_fn=sample)
  return seqio.MixtureRegistry.get(mixture)


def _tf():
  return load_tensorflow()[1]


def _registered() -> list[str]:
  # Only code that has imported seqio can have registered anything, so a look-up need not import it.
  if "seqio" not in sys.modules:
    return []
  seqio, _ = load_tensorflow()
  names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  return sorted(n for n in names if not n.startswith(PREFIX))


def _user_provider(name: str, vocabulary: str):
  seqio, _ = load_tensorflow()
  found = seqio.get_mixture_or_task(name)
  features = found.output_features
  if set(features) != {"targets"}:
    raise UserError(
      f"The seqio task {name!r} has the features {', '.join(sorted(features))}; "
      "give it the single feature 'targets' that holds the whole text to predict."
    )
  if not same_vocabulary(features["targets"].vocabulary, load_vocabulary(vocabulary)):
    raise UserError(
      f"The seqio task {name!r} has the vocabulary {features['targets'].vocabulary}, "
      f"and data.vocabulary is {vocabulary!r}; make them the same."
    )
  return found


def _task(task: str, splits: Mapping[str, Documents], vocabulary: str):
  seqio, tf = load_tensorflow()
  content = "".join(f"{split} {documents.files} {documents.fingerprint()}" for split, documents in splits.items())
  name = f"{PREFIX}{task}.{_digest(content + vocabulary_digest(vocabulary))}"
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=_source(splits),
      preprocessors=[
        lambda ds: ds.map(lambda text: {"targets": text}),
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.preprocessors.append_eos,
      ],
      output_features={"targets": seqio.Feature(load_vocabulary(vocabulary), dtype=tf.int32)},
      shuffle_buffer_size=1,  # the source shuffles all documents; a buffer of texts here would only swell saved states
    )
  return seqio.TaskRegistry.get(name)


def _source(splits: Mapping[str, Documents]):
  """A seqio DataSource of texts that is shuffled whole and whose saved position is small, whatever its size."""
  seqio, tf = load_tensorflow()

  class DocumentSource(seqio.DataSource):
    supports_arbitrary_sharding = True

    def list_shards(self, split):
      return splits[split].files

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_unused):
      documents = splits[split]
      numbers = tf.data.Dataset.range(len(documents))
      if shard_info:
        numbers = numbers.shard(shard_info.num_shards, shard_info.index)
      numbers = numbers.batch(READ_AT_ONCE)
      if shuffle:
        # A keyed bijection of 0..n-1 with a new key each epoch. Dataset.shuffle would do the same with n numbers
        # in its state (300 bytes each). Hosts share the keys, so their shards of an epoch stay disjoint.
        keys = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
        ordered, last = numbers, len(documents) - 1
        numbers = keys.flat_map(
          lambda key: ordered.map(lambda i: tf.random.experimental.index_shuffle(i, tf.stack([key, key]), last))
        )

      def texts(chosen):
        out = np.empty(len(chosen), object)
        out[:] = [documents.read(i) for i in chosen]
        return out

      def fetch(chosen):
        # stateless: reading is pure, and a stateful function could not be checkpointed
        return tf.ensure_shape(tf.numpy_function(texts, [chosen], tf.string, stateful=False), [None])

      return numbers.map(fetch).unbatch()

  return DocumentSource(splits, num_input_examples={split: len(documents) for split, documents in splits.items()})


def _digest(text: str) -> str:
  return f"{zlib.crc32(text.encode()):08x}"
