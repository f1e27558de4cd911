"""Evaluations of a stored model: `experiments/evaluate.py` calls `run`."""

import dataclasses
import functools
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tsparse import files, sharding, workdir
from tsparse.analysis.report import print_tables
from tsparse.analysis.run import check_fits
from tsparse.convert.model import Model, open_model
from tsparse.data.embedded import check_embedded
from tsparse.data.encoding import first_token, load_tokenizer
from tsparse.errors import UserError
from tsparse.evaluate import interventions, report
from tsparse.evaluate.interventions import LEVELS, Setting
from tsparse.progress import warn
from tsparse.sparse.generate import find_predictors, sparse_mode
from tsparse.sparse.predictors import stored as trained

BOOTSTRAP = 1000  # resamples for the stderr of metrics that are no mean
DEFINITIONS = interventions.DEFINITIONS | report.DEFINITIONS


def run(
  model: Path,
  tasks: Sequence[str],
  out: Path,
  *,
  sparse: Sequence[str] = ("off",),
  predictors: Path | None = None,
  mask_shared: bool = False,
  data: Path | None = None,
  limit: int | None = None,
  batch_size: int | None = None,
  max_length: int | None = None,
  bos: str = "auto",
  samples: bool = False,
  console: Console | None = None,
) -> dict[str, Any]:
  """Evaluates a model on tasks under each of some settings, writes the results to `out` and returns evaluation.json.

  Args:
    model: a workdir of ours or a Hugging Face directory.
    tasks: see `tasks.load`.
    out: must not exist, or be empty.
    sparse: see `interventions.parse`.
    predictors: folder of those of the setting "predictor"; None for those the model holds, or those beside it.
    mask_shared: mask shared experts too.
    data: folder with copies of data sets, see `tasks.load`.
    limit: so many questions of each task, the first ones; None for all.
    batch_size: rows of a forward pass; None for 16, or the devices of the machine if they are more.
    max_length: tokens of the context; None for what the model is made for.
    bos: begin contexts with BOS, "on" or "off"; "auto" as the model was trained with, or its tokenizer does.
    samples: write each question and answer too.
    console: where progress and tables are printed.

  Raises:
    UserError: something of the above cannot be; nothing was written.
  """
  console = console or Console()
  settings = interventions.parse(sparse)
  files.check_new(out)
  opened = open_model(model)
  models = {setting.method: _model_of(opened, setting, predictors) for setting in settings}
  if predictors and "predictor" not in models:
    raise UserError(f"--predictors={predictors} is for --sparse=predictor: leave one of them out.")
  if mask_shared and not opened.config.num_shared_experts:
    raise UserError(f"--mask_shared: {model} has no shared experts, leave it out.")
  tokenizer = load_tokenizer(opened.vocabulary)
  check_embedded(tokenizer, opened.config.vocab_size)
  longest = opened.config.max_seq_len
  if max_length is not None and not 1 < max_length <= longest:
    raise UserError(f"--max_length={max_length}: the model is made for {longest} tokens, give 2 to {longest}.")
  batch_size = sharding.evaluation_rows(batch_size)
  mesh = sharding.evaluation_mesh([opened.config.d_model])
  check_fits(opened, mesh)

  _load_lm_eval()
  from lm_eval.evaluator import evaluate

  from tsparse.evaluate.harness import Harness
  from tsparse.evaluate.tasks import FEWSHOT_SEED, load

  with console.status("reading the tasks"):
    loaded = load(tasks, data)
  bos = first_token(tokenizer, opened.bos if bos == "auto" else bos) is not None
  context = max_length or longest
  harness = Harness(
    lambda setting: models[setting.method],
    tokenizer,
    mesh,
    embedded=opened.config.vocab_size,
    max_length=context,
    batch_size=batch_size,
    bos=bos,
    mask_shared=mask_shared,
    console=console,
  )
  facts = {
    "model": str(model),
    "activation": opened.config.activation,
    "limit": limit,
    "max_length": context,
    "bos": bos,
  }
  facts |= {"batch_size": batch_size, "mask_shared": mask_shared, "bootstrap_iters": BOOTSTRAP}
  seeds = {"random_seed": 0, "numpy_seed": FEWSHOT_SEED, "fewshot_seed": FEWSHOT_SEED}  # lm-eval's
  environment, results, asked, described = workdir.environment(), [], [], []
  with files.new_folder(out) as folder:
    for setting in settings:
      began = time.time()
      harness.use(setting)
      random.seed(seeds["random_seed"])
      np.random.seed(seeds["numpy_seed"])
      result = evaluate(harness, loaded.for_harness(), limit, bootstrap_iters=BOOTSTRAP, log_samples=samples)
      asked += [result.pop("samples")] if samples else []
      results.append(result | _as_lm_eval(facts | seeds, setting, tokenizer, environment, began))
      cut = dataclasses.asdict(harness.cut)
      fields = dataclasses.asdict(setting) | {"zero_fraction": harness.zero_fraction, "truncated": cut}
      described.append({"name": setting.name, **fields, "seconds": round(time.time() - began, 1)})
    scores = report.scores(results, loaded.shown)
    evaluation = {
      **facts,
      "settings": described,
      "scores": scores,
      "suites": report.suite_means(scores, loaded.suites),
      "definitions": DEFINITIONS,
      "environment": environment,
    }
    report.write(evaluation, results, asked, folder)
  print_tables([report.table(evaluation)], console)
  _say_what_was_cut(described[0]["truncated"], context, console)
  console.print(f"results  {out}", highlight=False, soft_wrap=True)
  return evaluation


def _model_of(opened: Model, setting: Setting, predictors: Path | None) -> Model:
  """The stored model of a setting; UserError where it has none."""
  if setting.method in LEVELS:
    return opened
  found = find_predictors(opened, setting.method, predictors) if setting.method == "predictor" else None
  model = opened if found is None else trained.merge(opened, found)
  sparse_mode(model.config, setting.method)
  return model


@functools.cache
def _load_lm_eval() -> None:
  """Imports lm-eval quietly, and in one process: its bootstrap would fork this one, whose JAX has threads."""
  os.environ |= {"DISABLE_MULTIPROC": "1"} | {"TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1")}
  try:
    import lm_eval.evaluator  # noqa: F401
  except ImportError as error:
    raise UserError(f"lm-eval is not installed ({error}): pip install -r requirements-eval.txt.") from None


def _as_lm_eval(
  facts: Mapping[str, Any], setting: Setting, tokenizer: Any, environment: Mapping[str, Any], began: float
) -> dict[str, Any]:
  """What lm-eval's `simple_evaluate` adds to the results."""
  from importlib.metadata import version

  config = {"model": "tsparse", "model_args": {"pretrained": facts["model"], "sparse": setting.name}, **facts}
  return {
    "config": config | {"batch_sizes": [facts["batch_size"]], "device": environment["device"]},
    "git_hash": environment["git"],
    "date": began,
    "lm_eval_version": version("lm_eval"),
    "model_source": "tsparse",
    "model_name": facts["model"],
    "max_length": facts["max_length"],
    "eot_token_id": tokenizer.eos,
    "total_evaluation_time_seconds": str(time.time() - began),
  }


def _say_what_was_cut(cut: Mapping[str, int], context: int, console: Console) -> None:
  if cut["requests"]:
    warn(
      console,
      f"{cut['requests']:,} requests were longer than the context of {context} tokens and lost {cut['tokens']:,} of "
      "theirs on the left, as in lm-eval.",
    )
