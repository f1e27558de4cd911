"""From any M to a workdir of ours, a Hugging Face directory or a GGUF, its activation swapped on the way if asked."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from tsparse import files
from tsparse.convert import gguf, rules, stored
from tsparse.convert.families import export_format
from tsparse.convert.huggingface import copy_tokenizer, put_bos, write_directory
from tsparse.convert.leaf import Leaf, cast, counted
from tsparse.convert.model import Model, open_model
from tsparse.convert.tokenizer_json import complete_for_transformers
from tsparse.convert.upcycle import upcycle
from tsparse.data.embedded import check_embedded
from tsparse.data.encoding import load_tokenizer
from tsparse.errors import UserError
from tsparse.progress import ByteProgressLine, warn
from tsparse.sparse.predictors import stored as trained

Leaves = Mapping[str, Leaf]
Plan = tuple[Leaves, Callable[[Leaves, Path], None]]


def convert(
  source: Path,
  out: Path,
  format: str,
  activation: str = "",
  dtype: str = "",
  experts: int = 0,
  predictors: Path | None = None,
  tokenizer: str = "",
  console: Console | None = None,
) -> Model:
  """Writes the model of `source` to the new folder `out`, slice by slice, and returns it, reopened unless in a GGUF.

  In memory there is at most the largest parameter, as stored in `source`, and 2 GiB; for a GGUF with experts, thrice a
  layer's of one kind, which are one tensor there.

  Args:
    source: a Hugging Face directory or a workdir of ours.
    out: must not exist, or be empty.
    format: "tsparse" (a workdir, with which `config.init` starts), "hf", "gguf" (for llama.cpp) or "powerinfer".
    activation: the activation of the result; "" keeps the source's.
    dtype: float32, bfloat16 or (of a GGUF's matrices) float16, of the weights written; "" keeps each as it is, float16
      as float32, but for powerinfer, where it is float16. Thresholds are float32 in any case.
    experts: above 0, a dense model is upcycled to so many experts.
    predictors: for powerinfer, a folder of experiments/predictors.py; None for those that the model holds, or for
      `predictors` beside it.
    tokenizer: the vocabulary to write, as config.data.vocabulary names one; "" for the source's own.
    console: where progress is shown; nowhere by default.

  Raises:
    UserError: the source cannot be read, `out` is in use or too small, the format is unknown or has no such models, or
      the tokenizer is another model's.
    RunFailure: writing failed. Nothing is left behind, in either case.
  """
  if format not in PLANS:
    raise UserError(f"--format={format} is unknown: choose one of {', '.join(PLANS)}.")
  if dtype not in ("", "float32", "bfloat16", *(["float16"] if format in GGUF else [])):
    choice = "float32, float16 or bfloat16" if format in GGUF else "float32 or bfloat16"
    raise UserError(f"--dtype={dtype} is unknown: choose {choice}, or leave it out to keep the source's.")
  if format in GGUF and out.suffix == ".gguf":
    raise UserError(f"--out={out}: the file is written into a folder, give its name without .gguf.")
  console = console or Console(quiet=True)
  if predictors and format != "powerinfer":
    raise UserError(f"--predictors={predictors} is for --format=powerinfer: leave it out.")
  model = with_tokenizer(open_model(source), tokenizer, format, console)
  if format == "powerinfer":
    model = with_predictors(model, predictors)
  leaves, tokens_seen = model.leaves()
  config = dataclasses.replace(model.config, activation=activation or model.config.activation)
  if experts:
    config, leaves = upcycle(config, leaves, experts)
  model = dataclasses.replace(model, config=config)
  tensors, write = PLANS[format](model, leaves, tokens_seen, dtype, console)
  total = sum(tensor.nbytes for tensor in tensors.values())
  with files.new_folder(out, total) as folder, ByteProgressLine(console, "converting", total) as bar:
    shown = {name: counted(tensor, lambda amount: bar.advance(amount=amount)) for name, tensor in tensors.items()}
    write(shown, folder)
  return dataclasses.replace(model, path=out) if format in GGUF else open_model(out)


def with_tokenizer(model: Model, given: str, format: str, console: Console) -> Model:
  """The model with the tokenizer `given` or its own, or with "" where that cannot be read, which is warned of.

  Raises:
    UserError: the tokenizer given cannot be read, or is another model's.
  """
  vocabulary = given or model.vocabulary
  try:
    tokenizer = load_tokenizer(vocabulary)
  except UserError as error:
    if given:
      raise UserError(f"--tokenizer={given}: {error}") from None
    if format in GGUF:  # which cannot be without: its plan says so, once it is known that there can be one
      return model
    warn(console, f"{model.path} is written without a tokenizer; name one by --tokenizer. {error}")
    return dataclasses.replace(model, vocabulary="")
  check_embedded(tokenizer, model.config.vocab_size)
  if vocabulary == "bytes" and format == "hf":
    warn(
      console,
      f"{model.path} is written without a tokenizer, as transformers has none of bytes: the id of a byte is its value "
      f"plus 3, BOS is {tokenizer.bos} and EOS is {tokenizer.eos}.",
    )
  return dataclasses.replace(model, vocabulary=vocabulary)


def with_predictors(model: Model, given: Path | None) -> Model:
  """The model with the predictors given, else, where it holds none, with those beside it, if there are any."""
  folder = given or (None if model.config.predictor_ranks else trained.beside(model.path))
  return model if folder is None else trained.merge(model, trained.load(folder, model))


def _is_threshold(name: str) -> bool:
  """Whether a parameter is a threshold, of the hidden or of a predictor: what is compared with it is in float32."""
  return name.endswith("/threshold")


def _cast(leaves: Leaves, dtype: str) -> Leaves:
  """The parameters in `dtype`, if there is one, thresholds always in float32."""
  dtypes = {name: np.float32 if _is_threshold(name) else dtype or leaf.dtype for name, leaf in leaves.items()}
  return {name: cast(leaf, jnp.dtype(dtypes[name])) for name, leaf in leaves.items()}


def _plan_workdir(model: Model, leaves: Leaves, tokens_seen: int, dtype: str, _: Console) -> Plan:
  return _cast(leaves, dtype), functools.partial(_write_workdir, model, tokens_seen)


def _plan_huggingface(model: Model, leaves: Leaves, _tokens: int, dtype: str, _: Console) -> Plan:
  return _cast(leaves, dtype), functools.partial(_write_huggingface, model)


def _plan_gguf(
  plan: Callable[[Model, Leaves, str], gguf.Plan], model: Model, leaves: Leaves, _: int, dtype: str, console: Console
) -> Plan:
  planned = plan(model, leaves, dtype)
  for sentence in planned.warnings:
    warn(console, sentence)
  return planned.tensors, functools.partial(gguf.write, planned)


def _write_workdir(model: Model, tokens_seen: int, leaves: Leaves, folder: Path):
  fields = dataclasses.asdict(model.config)
  record = {
    "name": f"converted from {model.path}",
    "activation": fields.pop("activation"),
    "model": fields,
    # the tokenizer's files came along
    "data": {"vocabulary": "bytes" if model.vocabulary == "bytes" else ".", "bos": model.bos, "eos": model.eos},
  }
  _copy_tokenizer(model, folder)
  stored.save(folder, leaves, tokens_seen)
  files.write(folder / "config.json", files.to_json(record))


def _write_huggingface(model: Model, leaves: Leaves, folder: Path):
  dtype = functools.reduce(jnp.promote_types, (leaf.dtype for name, leaf in leaves.items() if not _is_threshold(name)))
  fields, mapping, modeling = export_format(model.config, dtype.name)
  if model.vocabulary == "bytes":
    fields["tsparse_vocabulary"] = "bytes"
  fields["tsparse_eos"] = model.eos
  if model.bos != "auto":
    fields["tsparse_bos"] = model.bos
  _copy_tokenizer(model, folder)
  if model.vocabulary not in ("", "bytes"):
    complete_for_transformers(folder)
    put_bos(folder, model.bos)
  write_directory(folder, fields, rules.to_theirs(mapping, model.config, leaves), modeling)


def _copy_tokenizer(model: Model, folder: Path):
  if model.vocabulary not in ("", "bytes"):
    copy_tokenizer(model.vocabulary, folder)


GGUF = {"gguf": gguf.plan_llama_cpp, "powerinfer": gguf.plan_powerinfer}
# format -> (model, its parameters, tokens seen, --dtype, console) -> what is read, and what writes it when given that
PLANS = {
  "tsparse": _plan_workdir,
  "hf": _plan_huggingface,
  **{name: functools.partial(_plan_gguf, plan) for name, plan in GGUF.items()},
}
