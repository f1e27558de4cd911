"""From any M to a workdir of ours or to a Hugging Face directory, its activation swapped on the way if asked."""

import dataclasses
import fcntl
import functools
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
from absl import logging
from rich.console import Console

from tsparse import files
from tsparse.convert import rules, stored
from tsparse.convert.families import export_format
from tsparse.convert.huggingface import copy_tokenizer, write_directory
from tsparse.convert.leaf import Leaf, cast, counted
from tsparse.convert.model import Model, open_model
from tsparse.convert.upcycle import upcycle
from tsparse.errors import RunFailure, UserError
from tsparse.progress import ByteProgressLine


def convert(
  source: Path,
  out: Path,
  format: str,
  activation: str = "",
  dtype: str = "",
  experts: int = 0,
  console: Console | None = None,
) -> Model:
  """Writes the model of `source` to the new folder `out`, slice by slice, and returns it, reopened.

  In memory there is at most the largest parameter, as stored in `source`, and 2 GiB.

  Args:
    source: a Hugging Face directory or a workdir of ours.
    out: must not exist, or be empty.
    format: "tsparse" (a workdir, with which `config.init` starts) or "hf".
    activation: the activation of the result; "" keeps the source's.
    dtype: float32 or bfloat16, of the weights written; "" keeps each as it is (float16 becomes float32).
    experts: above 0, a dense model is upcycled to so many experts.
    console: where progress is shown; nowhere by default.

  Raises:
    UserError: the source cannot be read, `out` is in use or too small, or the format is unknown.
    RunFailure: writing failed. Nothing is left behind, in either case.
  """
  if format not in WRITERS:
    raise UserError(f"--format={format} is unknown: choose one of {', '.join(WRITERS)}.")
  if dtype not in ("", "float32", "bfloat16"):
    raise UserError(f"--dtype={dtype} is unknown: choose float32 or bfloat16, or leave it out to keep the source's.")
  model = open_model(source)
  leaves, tokens_seen = model.leaves()
  config = dataclasses.replace(model.config, activation=activation or model.config.activation)
  if experts:
    config, leaves = upcycle(config, leaves, experts)
  if dtype:
    leaves = {name: cast(leaf, jnp.dtype(dtype)) for name, leaf in leaves.items()}
  total = sum(leaf.nbytes for leaf in leaves.values())
  with (
    new_folder(out, total) as folder,
    ByteProgressLine(console or Console(quiet=True), "converting", total) as bar,
  ):
    if model.vocabulary != "bytes":
      copy_tokenizer(model.vocabulary, folder)
    leaves = {name: counted(leaf, lambda amount: bar.advance(amount=amount)) for name, leaf in leaves.items()}
    WRITERS[format](dataclasses.replace(model, config=config), leaves, tokens_seen, folder)
  return open_model(out)


def _write_workdir(model: Model, leaves: Mapping[str, Leaf], tokens_seen: int, folder: Path):
  fields = dataclasses.asdict(model.config)
  record = {
    "name": f"converted from {model.path}",
    "activation": fields.pop("activation"),
    "model": fields,
    "data": {"vocabulary": "bytes" if model.vocabulary == "bytes" else "."},  # the tokenizer's files came along
  }
  stored.save(folder, leaves, tokens_seen)
  files.write(folder / "config.json", files.to_json(record))


def _write_huggingface(model: Model, leaves: Mapping[str, Leaf], tokens_seen: int, folder: Path):
  del tokens_seen
  dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves.values()))
  fields, mapping, modeling = export_format(model.config, dtype.name)
  if model.vocabulary == "bytes":
    fields["tsparse_vocabulary"] = "bytes"
  write_directory(folder, fields, rules.to_theirs(mapping, model.config, leaves), modeling)


WRITERS = {"tsparse": _write_workdir, "hf": _write_huggingface}


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
  """A scratch folder beside `out` that becomes `out` when all went well, and is removed otherwise.

  Args:
    out: must not exist, or be empty.
    needed: bytes that will be written.

  Raises:
    UserError: `out` is in use or cannot be written, or its disk has less room.
    RunFailure: an OSError came up inside.
  """
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} is in use: give a folder that does not exist yet.")
  parent = out.absolute().parent
  _remove_leftovers(parent, out.name)
  free = shutil.disk_usage(next(folder for folder in (parent, *parent.parents) if folder.exists())).free
  if needed > free:
    raise UserError(
      f"--out={out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left: make room, or give a folder "
      "on another."
    )
  scratch = parent / f".{out.name}.{os.getpid()}"
  try:
    scratch.mkdir(parents=True)
  except OSError as error:
    raise UserError(f"--out={out} cannot be written ({error.strerror}): give another folder.") from None
  lock = os.open(scratch, os.O_RDONLY)  # the kernel frees it however the process ends
  fcntl.flock(lock, fcntl.LOCK_EX)
  try:
    yield scratch
    scratch.replace(out)
  except OSError as error:
    shutil.rmtree(scratch, ignore_errors=True)
    raise RunFailure(
      f"--out={out} could not be written ({error.strerror or error}) and is not there: make room, or give another."
    ) from error
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  finally:
    os.close(lock)


def _remove_leftovers(parent: Path, name: str):
  """Removes the scratch folders for `parent / name` whose writers were killed."""
  for scratch in parent.glob(f".{glob.escape(name)}.*") if parent.is_dir() else ():
    if not (scratch.is_dir() and scratch.suffix[1:].isdigit()):
      continue
    lock = os.open(scratch, os.O_RDONLY)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      logging.warning("removing %s, left by a conversion that was killed", scratch)
      shutil.rmtree(scratch, ignore_errors=True)
    except BlockingIOError:  # its writer lives
      pass
    finally:
      os.close(lock)
