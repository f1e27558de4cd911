"""seqio: tasks and mixtures of the user's, and our own sources as seqio tasks.

A task has an int32 feature `targets`, ending in EOS, that holds the whole text to predict, and may have `loss_mask` of
the same length: 1 where the target counts in the loss.
"""

import functools
import os
import sys
import zlib
from collections.abc import Mapping

import numpy as np

from tsparse.data.chat import ENCODING, ChatEncoder
from tsparse.data.encoding import load_tokenizer, make_encoder, tokenizer_digest
from tsparse.data.sources import Documents
from tsparse.data.tensorflow import load_tensorflow
from tsparse.data.vocabulary import load_vocabulary, same_vocabulary
from tsparse.errors import UserError

PREFIX = "tsparse."  # of our names in seqio's process-wide registry
SHARD = 10_000  # documents that one worker of seqio's cache job encodes
READ_AT_ONCE = 16  # documents per call into Python: a call costs about 0.2 ms, as much as ten reads


def registered() -> list[str]:
  """The user's names in seqio's registry."""
  # Only code that has imported seqio can have registered anything, so a look-up need not import it.
  if "seqio" not in sys.modules:
    return []
  seqio, _ = load_tensorflow()
  names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  return sorted(n for n in names if not n.startswith(PREFIX))


def members(name: str) -> list[tuple[str, float]]:
  """(task, share of the tokens) of a registered task or mixture: a mixture's rates are taken as shares of tokens."""
  seqio, _ = load_tensorflow()
  found = seqio.get_mixture_or_task(name)
  if isinstance(found, seqio.Task):
    return [(name, 1.0)]
  rates = [(task.name, float(found.get_rate(task))) for task in found.tasks]
  total = sum(rate for _, rate in rates)
  if not total > 0 or any(rate < 0 for _, rate in rates):
    raise UserError(f"The seqio mixture {name!r} has rates that add up to {total:g} or are negative: mend them.")
  return [(task, rate / total) for task, rate in rates]


def splits(name: str) -> list[str]:
  """The splits of a registered task."""
  seqio, _ = load_tensorflow()
  return sorted(seqio.get_mixture_or_task(name).splits)


def user_task(name: str, vocabulary: str):
  """The registered task `name`; UserError where it has other features or another vocabulary."""
  seqio, _ = load_tensorflow()
  found = seqio.get_mixture_or_task(name)
  features = found.output_features
  if set(features) - {"loss_mask"} != {"targets"}:
    raise UserError(
      f"The seqio task {name!r} has the features {', '.join(sorted(features))}; "
      "give it the single feature 'targets' that holds the whole text to predict (and 'loss_mask' if not all counts)."
    )
  if not same_vocabulary(features["targets"].vocabulary, load_vocabulary(vocabulary)):
    raise UserError(
      f"The seqio task {name!r} has the vocabulary {features['targets'].vocabulary}, "
      f"and data.vocabulary is {vocabulary!r}; make them the same."
    )
  return found


def files_task(name: str, documents: Mapping[str, Documents], vocabulary: str, chat: bool = False):
  """The seqio task of documents (or conversations) of ours: what seqio's own tools (caching, evaluation) read.

  Registered on first use, under a name unique to its content and the vocabulary.
  """
  seqio, tf = load_tensorflow()
  content = "".join(f"{split} {part.files} {part.fingerprint()}" for split, part in documents.items())
  content += f" conversations {ENCODING}" if chat else ""
  name = f"{PREFIX}{name}.{_digest(content + tokenizer_digest(vocabulary))}"
  if name not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
      name,
      source=_source(documents),
      preprocessors=[_conversations(vocabulary), seqio.CacheDatasetPlaceholder()]
      if chat
      else [
        lambda ds: ds.map(lambda text: {"targets": text}),
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        seqio.preprocessors.append_eos,
        seqio.CacheDatasetPlaceholder(),
      ],
      output_features={"targets": seqio.Feature(load_vocabulary(vocabulary), dtype=tf.int32)}
      | ({"loss_mask": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.int32)} if chat else {}),
      shuffle_buffer_size=1,  # the source shuffles all documents; a buffer of texts here would only swell saved states
    )
  return seqio.TaskRegistry.get(name)


def check_cached(task, folder: str):
  """Lets seqio look for cached tasks in `folder`, and raises UserError where `task` is not there."""
  seqio, _ = load_tensorflow()
  folder = os.path.expanduser(folder)
  if folder not in seqio.get_global_cache_dirs():
    seqio.add_global_cache_dirs([folder])
  if not task.supports_caching or not task.cache_dir:
    raise UserError(
      f"The tokens of {task.name} are not in config.data.cached {folder}: let seqio_cache_tasks write them (again, if "
      "the text or the vocabulary changed: the name says which), or leave config.data.cached empty."
    )


def mixture(title: str, rates: list[tuple[str, float]]):
  """The seqio mixture of registered tasks (name, rate).

  seqio draws documents at these rates; ours are shares of tokens, which only `tsparse.data.lanes` keeps.
  """
  seqio, _ = load_tensorflow()
  name = f"{PREFIX}{title}.{_digest(str(rates))}"
  if name not in seqio.MixtureRegistry.names():
    # Without stop_on_empty_dataset an epoch (evaluation) holds every document of every task.
    sample = functools.partial(load_tensorflow()[1].data.Dataset.sample_from_datasets, stop_on_empty_dataset=False)
    seqio.MixtureRegistry.add(name, rates, sample_fn=sample)
  return seqio.MixtureRegistry.get(name)


def _conversations(vocabulary: str):
  """A preprocessor of conversations (`chat.Chat.text_of`): targets, EOS last, and loss_mask."""
  _, tf = load_tensorflow()
  tokenizer = load_tokenizer(vocabulary)
  encoder = ChatEncoder(tokenizer, make_encoder(tokenizer, True, 0))

  def encode(text):
    conversation, place, pieces = encoder.open(np.array(text, object).item().decode()), 0, []
    while place < len(conversation):
      *piece, place = encoder.piece(conversation, place)
      pieces.append(piece)
    return [np.concatenate(each) for each in zip(*pieces, strict=True)]

  def example(text):
    # stateless: encoding is pure, and a stateful function could not be checkpointed
    targets, mask = tf.numpy_function(encode, [text], [tf.int32, tf.int32], stateful=False)
    return {"targets": tf.ensure_shape(targets, [None]), "loss_mask": tf.ensure_shape(mask, [None])}

  return lambda dataset: dataset.map(example)


def _source(splits: Mapping[str, Documents]):
  """A seqio DataSource of texts that is shuffled whole and whose saved position is small, whatever its size."""
  seqio, tf = load_tensorflow()

  class DocumentSource(seqio.DataSource):
    supports_arbitrary_sharding = True

    def list_shards(self, split):
      return [str(number) for number in range(-(-len(splits[split]) // SHARD))]

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
