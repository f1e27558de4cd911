"""A tokenizer's files, copied: into exports, and into every workdir, so that a run can be repeated from that alone.

WORKDIR/tokenizer holds what the run was trained with. It is read where the path of `config.data.vocabulary` is gone, or
holds another tokenizer by now.
"""

import functools
import json
import os
import shutil
from pathlib import Path

from absl import logging

from tsparse import files
from tsparse.data.encoding import tokenizer_digest
from tsparse.errors import UserError

KEPT = "tokenizer"  # folder of a workdir
# What is known of a tokenizer's folder, which may hold weights and anything else: nothing but these is copied.
NAMES = (
  "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def copy_files(vocabulary: str, target: Path, link: bool = False):
  """Copies a tokenizer's files into a folder.

  Args:
    vocabulary: see `tokenizer.read_tokenizer`; a SentencePiece model of any name becomes tokenizer.model, and no
      tokenizer.json that lies beside it is taken for the tokenizer of its own name.
    target: a folder that holds none of them.
    link: hard links in place of copies, where the disk has such: for copies that are ours, which nobody writes to.
  """
  path = Path(vocabulary).expanduser()
  folder = path if path.is_dir() else path.parent
  found = {name: folder / name for name in NAMES if (folder / name).is_file()}
  if path.is_file():
    found["tokenizer.json" if path.suffix == ".json" else "tokenizer.model"] = path
  for name, source in found.items():
    try:
      if not link:
        raise OSError
      os.link(source, target / name)
    except OSError:
      shutil.copyfile(source, target / name)


def special_ids(vocabulary: str) -> dict[str, int | list[int]]:
  """BOS and EOS as config.json beside a tokenizer names them."""
  path = Path(vocabulary).expanduser()
  config = (path if path.is_dir() else path.parent) / "config.json"
  try:
    fields = json.loads(config.read_text()) if config.is_file() else {}
  except (OSError, ValueError) as error:
    raise UserError(f"{config} cannot be read ({error}): fetch it again.") from None
  keys = ("bos_token_id", "eos_token_id") if isinstance(fields, dict) else ()
  return {key: fields[key] for key in keys if fields.get(key) is not None}


def keep(vocabulary: str, workdir: Path, like: Path | None = None):
  """Copies the tokenizer into WORKDIR/tokenizer, or links the copy of the workdir `like`; bytes need none.

  Raises:
    UserError: there is another tokenizer already, or the copy would be read otherwise.
  """
  if vocabulary == "bytes":
    return
  target, linked = workdir / KEPT, like and kept(vocabulary, like)
  vocabulary = linked or vocabulary
  if not target.exists():
    scratch = workdir / f".{KEPT}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    copy_files(vocabulary, scratch, link=bool(linked))
    if ids := special_ids(vocabulary):
      files.write(scratch / "config.json", files.to_json(ids))
    scratch.replace(target)
  if tokenizer_digest(kept(vocabulary, workdir) or str(target)) != tokenizer_digest(vocabulary):
    raise UserError(
      f"{target} holds another tokenizer than config.data.vocabulary {vocabulary!r}: give another --workdir, or move "
      "that folder away."
    )


def kept(vocabulary: str, workdir: Path) -> str | None:
  """The copy of a tokenizer in a workdir as a vocabulary; None where there is none."""
  folder = workdir / KEPT
  if vocabulary == "bytes" or not folder.is_dir():
    return None
  alone = folder / "tokenizer.model"  # read beside a tokenizer.json too, where it is what was named
  return str(alone if Path(vocabulary).suffix == ".model" and alone.is_file() else folder)


def vocabulary_of(workdir: Path, vocabulary: str) -> str:
  """What to load of a workdir whose config says `vocabulary`: that, or its copy if it is gone or another by now."""
  copy = kept(vocabulary, workdir)
  if copy is None or copy == vocabulary:
    return vocabulary
  try:
    if tokenizer_digest(vocabulary) == tokenizer_digest(copy):
      return vocabulary
    reason = "has changed since"
  except UserError:
    reason = "cannot be read any more"
  _say(f"The vocabulary {vocabulary} {reason}: the copy that was made of it is used, {copy}.")
  return copy


@functools.cache
def _say(sentence: str):
  logging.warning("%s", sentence)
