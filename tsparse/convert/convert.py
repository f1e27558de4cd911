"""From any M to a workdir of ours or to a Hugging Face directory, its activation swapped on the way if asked."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from tsparse import files
from tsparse.convert import rules, stored
from tsparse.convert.families import export_format
from tsparse.convert.huggingface import copy_tokenizer, write_directory
from tsparse.convert.leaf import Leaf, cast, counted
from tsparse.convert.model import Model, open_model
from tsparse.convert.upcycle import upcycle
from tsparse.errors import UserError
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
    files.new_folder(out, total) as folder,
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
    # the tokenizer's files came along
    "data": {"vocabulary": "bytes" if model.vocabulary == "bytes" else ".", "eos": model.eos},
  }
  stored.save(folder, leaves, tokens_seen)
  files.write(folder / "config.json", files.to_json(record))


def _write_huggingface(model: Model, leaves: Mapping[str, Leaf], tokens_seen: int, folder: Path):
  del tokens_seen
  dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves.values()))
  fields, mapping, modeling = export_format(model.config, dtype.name)
  if model.vocabulary == "bytes":
    fields["tsparse_vocabulary"] = "bytes"
  fields["tsparse_eos"] = model.eos
  write_directory(folder, fields, rules.to_theirs(mapping, model.config, leaves), modeling)


WRITERS = {"tsparse": _write_workdir, "hf": _write_huggingface}
