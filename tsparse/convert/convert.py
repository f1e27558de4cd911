"""From any M to a workdir of ours or to a Hugging Face directory, its activation swapped on the way if asked."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse import files, sharding
from tsparse.convert import rules
from tsparse.convert.families import export_format
from tsparse.convert.huggingface import copy_tokenizer, write_directory
from tsparse.convert.model import Model, open_model
from tsparse.convert.upcycle import upcycle
from tsparse.errors import UserError
from tsparse.files import new_folder
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.train import checkpoint


def convert(
  source: Path, out: Path, format: str, activation: str = "", dtype: str = "float32", experts: int = 0
) -> Model:
  """Writes the model of `source` to the new folder `out` and returns it, reopened.

  Args:
    source: a Hugging Face directory or a workdir of ours.
    out: must not exist, or be empty.
    format: "tsparse" (a workdir, with which `config.init` starts) or "hf".
    activation: the activation of the result; "" keeps the source's.
    dtype: float32 or bfloat16, of the weights written by "hf"; ours are float32.
    experts: above 0, a dense model is upcycled to so many experts.

  Raises:
    UserError: the source cannot be read, `out` is in use, or the format is unknown. Nothing is left behind.
  """
  if format not in WRITERS:
    raise UserError(f"--format={format} is unknown: choose one of {', '.join(WRITERS)}.")
  if dtype not in ("float32", "bfloat16"):
    raise UserError(f"--dtype={dtype} is unknown: choose float32 or bfloat16.")
  model = open_model(source)
  config = dataclasses.replace(model.config, activation=activation or model.config.activation)
  params, tokens_seen = model.restore(_on_one_device(config))
  if experts:
    config, params = upcycle(config, params, experts)
  with new_folder(out) as folder:
    if model.vocabulary != "bytes":
      copy_tokenizer(model.vocabulary, folder)
    WRITERS[format](dataclasses.replace(model, config=config), params, tokens_seen, folder, dtype)
  return open_model(out)


def _on_one_device(config) -> Any:
  """Abstract parameters of a model, whole on the first device."""
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
  shapes, logical = abstract_parameters(Transformer(config))
  return checkpoint.abstract(shapes, sharding.shardings(mesh, logical))


def _write_workdir(model: Model, params: Any, tokens_seen: int, folder: Path, dtype: str):
  del dtype
  fields = dataclasses.asdict(model.config)
  record = {
    "name": f"converted from {model.path}",
    "activation": fields.pop("activation"),
    "model": fields,
    "data": {"vocabulary": "bytes" if model.vocabulary == "bytes" else "."},  # the tokenizer's files came along
  }
  checkpoint.save_parameters(folder, params, tokens_seen)
  files.write(folder / "config.json", files.to_json(record))


def _write_huggingface(model: Model, params: Any, tokens_seen: int, folder: Path, dtype: str):
  del tokens_seen
  flat = {sharding.path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
  fields, mapping, modeling = export_format(model.config, dtype)
  if model.vocabulary == "bytes":
    fields["tsparse_vocabulary"] = "bytes"
  tensors = rules.to_theirs(mapping, model.config, flat)
  write_directory(folder, fields, ((name, x.astype(jnp.dtype(dtype))) for name, x in tensors), modeling)


WRITERS = {"tsparse": _write_workdir, "hf": _write_huggingface}
