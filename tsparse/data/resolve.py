"""From the name of a D to its sources: what is drawn from, in which shares, and which documents are held out.

A D is, in this order: a mixture of `mixtures`, one of their sources, one of our stdlib tasks, a task or mixture of
seqio's registry, or a file or folder, as it is written or under `config.data.root`, after "chat:" one of conversations
(`chat`).
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence

from tsparse.data import stdlib, tasks
from tsparse.data.chat import PREFIX, Chat, has_markers
from tsparse.data.encoding import load_tokenizer
from tsparse.data.formats import LISTED, SUFFIXES, TFDS, is_remote, path_of, tfds_folder
from tsparse.data.mixtures import MIXTURES, Declared
from tsparse.data.settings import DataSettings
from tsparse.data.sources import Documents, documents_of, held_out_splits
from tsparse.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """What documents are drawn from.

  Attributes:
    name: tells it from the others of its mixture.
    weight: share of the tokens; those of a mixture add up to 1.
    category: of the source, or "".
    documents: {split: documents} of files; empty for a seqio task.
    task: name of a seqio task, or "" for files (and TFDS, which is unpacked into one).
    chat: whether documents are conversations.
    whole: whether it is a file or folder that is a D by itself: all of it is evaluated on, and trained on where the
      held-out text is elsewhere. A source of a mixture always keeps its splits apart.
  """

  name: str
  weight: float = 1.0
  category: str = ""
  documents: Mapping[str, Documents] = dataclasses.field(default_factory=dict)
  task: str = ""
  chat: bool = False
  whole: bool = False

  def splits(self) -> list[str]:
    """What it can be asked for."""
    return list(self.documents) if self.documents else tasks.splits(self.task)


class Missing(UserError):
  """A source that is not there: `place`, where it was looked for, and `get`, how to get it."""

  def __init__(self, name: str, place: str, get: str):
    super().__init__(f"Cannot read {name}: No such file or folder at {place}; {get}.")
    self.line = f"{name} (not at {place}; {get})"
    self.get = get


def training(data: DataSettings) -> list[tuple[Source, str]]:
  """(source, split) of everything that is trained on: all of a file or folder where validation has its own.

  Raises:
    UserError: a D is unknown, missing, unreadable or malformed, or the weights are.
  """
  return [(source, _training_split(source, data)) for source in _sources(data)]


def validation(data: DataSettings) -> list[tuple[Source, str]]:
  """(source, split) of everything that is evaluated on. A source of a mixture that holds out nothing is not in it.

  Raises:
    UserError: as `training`, or there is none.
  """
  found = held_out(data)
  if not found:
    raise UserError(_nothing_held_out((resolve(data.validation, data) if data.validation else _sources(data))[0]))
  return found


def held_out(data: DataSettings) -> list[tuple[Source, str]]:
  """`validation`, and [] where there is none."""
  sources = resolve(data.validation, data) if data.validation else _sources(data)
  if data.validation and sources[0].whole:
    return [(sources[0], "all")]
  return _renormalized([(source, "validation") for source in sources if "validation" in source.splits()])


def _training_split(source: Source, data: DataSettings) -> str:
  """The split to train on: "all" of files of which nothing need be or can be held out."""
  available = source.splits()
  if "all" in available and ((source.whole and data.validation) or "train" not in available):
    return "all"
  if "train" in available:
    return "train"
  raise UserError(f"The data {source.name!r} has no split 'train', only {', '.join(available)}; name another.")


def _nothing_held_out(source: Source) -> str:
  if "all" not in source.splits():
    return (
      f"The data {source.name!r} has no split 'validation', only {', '.join(source.splits())}; set data.validation to "
      "another."
    )
  return (
    f"Cannot hold out validation documents of {source.name}: it has only {len(source.documents['all'])} document(s), "
    "and one in 20 is held out by the crc32 of its text; set data.validation to a file of its own."
  )


def describe(data: DataSettings) -> str:
  """One line on what is trained on: the shares of a mixture and what is missing from it; "" for a single source."""
  missing = []
  sources = _sources(data, missing)
  if len(sources) + len(missing) < 2:
    return ""
  shares = ", ".join(f"{source.name} {source.weight:.2%}" for source in sources)
  left_out = f"; missing and left out: {', '.join(missing)}" if missing else ""
  return f"{data.mixture or data.train}: {shares}{left_out}"


def _sources(data: DataSettings, missing: list[str] | None = None) -> list[Source]:
  if not data.mixture:
    return resolve(data.train, data, missing)
  parts = [(name, weight, lambda name=name: resolve(name, data)) for name, weight in parse_mixture(data.mixture)]
  return _mixed("config.data.mixture", parts, data, missing)


def parse_mixture(text: str) -> list[tuple[str, float]]:
  """[(name, weight)] of "name:weight,name:weight"; UserError where it is not that."""
  parts = []
  for part in text.split(","):
    name, colon, number = part.strip().rpartition(":")
    try:
      weight = float(number)
    except ValueError:
      weight = math.nan
    if not colon or not name or not math.isfinite(weight):
      raise UserError(f'config.data.mixture has {part!r} where "name:weight" belongs, a D and a number: mend it.')
    parts.append((name, weight))
  return parts


def _mixed(title: str, parts: Sequence, data: DataSettings, missing: list[str] | None) -> list[Source]:
  """The sources of all parts (name, weight, function that gives its sources), with weights that add up to 1."""
  names = [name for name, *_ in parts]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise UserError(f"{title} names {', '.join(twice)} twice: give each source once, with the sum of its weights.")
  negative = [f"{name}:{weight:g}" for name, weight, _ in parts if weight < 0]
  if negative or not sum(weight for _, weight, _ in parts) > 0:
    what = f"has negative weights ({', '.join(negative)})" if negative else "has weights that add up to 0"
    raise UserError(f"{title} {what}: a weight is a share of the tokens, not negative, and one must be positive.")
  found, absent = [], []
  for name, weight, find in parts:
    try:
      sources = find()
    except Missing as e:
      absent.append((name, e.line))
      continue
    found += [dataclasses.replace(source, weight=weight * source.weight, whole=False) for source in sources]
  if absent and not (data.allow_missing and found):
    lines = "; ".join(line for _, line in absent)
    raise UserError(
      f"{title}: {len(absent)} of {len(parts)} sources are missing: {lines}. Get them, or train on the others by "
      "--config.data.allow_missing=true."
    )
  if missing is not None:
    missing += [name for name, _ in absent]
  names = [source.name for source in found]
  if len(set(names)) < len(names):  # a source inside two mixtures
    raise UserError(f"{title} holds a source twice, by itself or in a mixture: {', '.join(names)}.")
  total = sum(source.weight for source in found)
  if not total > 0:
    raise UserError(f"{title}: the weights of the sources that are there add up to 0: give one a positive weight.")
  return [dataclasses.replace(source, weight=source.weight / total) for source in found]


def _renormalized(found: list[tuple[Source, str]]) -> list[tuple[Source, str]]:
  total = sum(source.weight for source, _ in found) or 1.0
  return [(dataclasses.replace(source, weight=source.weight / total), split) for source, split in found]


def resolve(name: str, data: DataSettings, missing: list[str] | None = None) -> list[Source]:
  """The sources of D, with weights that add up to 1.

  Args:
    name: of the D.
    data: the settings by which it is found and read.
    missing: where the names of sources that are left out (`allow_missing`) are added.

  Raises:
    UserError: D is unknown, or its files cannot be read; of a mixture, all that is missing and where to get it.
  """
  if name in MIXTURES:
    parts = [(d.name, d.weight, lambda d=d: [_declared(d, data)]) for d in MIXTURES[name]]
    return _mixed(name, parts, data, missing)
  declared = {d.name: d for mixture in MIXTURES.values() for d in mixture}
  if name in declared:
    return [_declared(declared[name], data)]
  if name in stdlib.TASKS:
    members = stdlib.TASKS[name]
    return [dataclasses.replace(_stdlib(task, data), weight=1 / len(members)) for task in members]
  if name in tasks.registered():
    return [Source(task, rate, task=task) for task, rate in tasks.members(name)]
  chat = name.startswith(PREFIX)
  path = path_under(name.removeprefix(PREFIX), data)
  if path is not None:
    documents = documents_of(path, data, _chat(data) if chat else "")
    return [Source(name, documents=held_out_splits(documents), chat=chat, whole=True)]
  raise unknown(name)


def unknown(name: str) -> UserError:
  """The sentence for a D that is nothing."""
  declared = [d.name for mixture in MIXTURES.values() for d in mixture]
  known = [*MIXTURES, *stdlib.TASKS, *tasks.registered(), *declared]
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean {nearest[0]!r}? " if nearest else ""
  return UserError(
    f"Unknown data {name!r}: {hint}name a {LISTED} file, a folder of them, {PREFIX}FILE for conversations, or a task "
    f"or mixture ({', '.join(known)})."
  )


def _chat(data: DataSettings) -> Chat:
  return Chat(spelled=not has_markers(load_tokenizer(data.vocabulary)))


def _stdlib(task: str, data: DataSettings) -> Source:
  folder = stdlib.extracted()
  documents = {s: documents_of(str(folder / f"{task}.{s}.jsonl"), data, "text") for s in ("train", "validation")}
  return Source(task, category=stdlib.CATEGORIES[task], documents=documents)


def path_under(name: str, data: DataSettings) -> str | None:
  """Where the file or folder of D is, by itself or under the root; None where it is no file.

  Raises:
    Missing: D looks like a file and is not there.
  """
  under = str(path_of(data.root) / name) if data.root and name and not is_remote(name) else ""
  for path in filter(None, (name, under)):
    if path_of(path).exists():
      return path
  if name.endswith(SUFFIXES) or is_remote(name) or os.sep in name:
    raise Missing(name, f"{name} and {under}" if under else name, f"name a {LISTED} file or folder that is there")
  return None


def place_of(source: Declared, data: DataSettings) -> str:
  """Path of the files of a source of a mixture, or tfds://NAME:VERSION of the dataset that is read in their place.

  Raises:
    Missing: neither is there.
  """
  root = path_of(data.root) if data.root else None
  files = source.files or source.name
  if root is not None and (root / files).exists():
    return str(root / files)
  tfds = f"{TFDS}{source.tfds}" if source.tfds else ""
  if tfds and (tfds_folder(tfds) / "dataset_info.json").exists():
    return tfds
  place = f"{root / files}" if root is not None else f"{files} of config.data.root, which is not set"
  if tfds:
    place += f" and as {tfds_folder(tfds)}"
  raise Missing(source.name, place, f"get {source.get}")


def _declared(source: Declared, data: DataSettings) -> Source:
  """A source of a mixture, by itself; Missing where it is not there."""
  place, chat = place_of(source, data), source.format == "chat"
  if place.startswith(TFDS):
    splits = {split: documents_of(f"{place}/{split}", data, source.field) for split in ("train", "validation")}
    return Source(source.name, category=source.category, documents=splits)
  field = _chat(data) if chat else source.field
  splits = held_out_splits(documents_of(place, data, field))
  if source.validation and (held_out := path_of(data.root) / source.validation).exists():
    splits = {"train": splits["all"], "validation": documents_of(str(held_out), data, field)}
  return Source(source.name, category=source.category, documents=splits, chat=chat)


def seqio_task(source: Source, vocabulary: str):
  """The seqio task of a source; UserError where one of the user's has other features or another vocabulary."""
  if source.task:
    return tasks.user_task(source.task, vocabulary)
  title = source.name if source.name.isidentifier() else "files"  # seqio's names are of letters, digits, _ and .
  return tasks.files_task(title, source.documents, vocabulary, source.chat)


def seqio_provider(name: str, data: DataSettings):
  """D as a seqio Task or Mixture, registered, for seqio's own tools; its rates are the weights."""
  sources = resolve(name, data)
  made = [(seqio_task(source, data.vocabulary), source.weight) for source in sources]
  if len(made) == 1:
    return made[0][0]
  return tasks.mixture(name if name.isidentifier() else "mixture", [(task.name, weight) for task, weight in made])
