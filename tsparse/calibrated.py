"""The model of a stage with calibrated thresholds, as a workdir of its own: STAGE/calibrated."""

import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from tsparse import files, hosts, sharding
from tsparse.analysis.calibrate import calibrate
from tsparse.convert.model import open_model
from tsparse.data import tokenizer_files
from tsparse.models.config import ffn_layers, model_config
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.progress import ProgressLine
from tsparse.recipes.thresholds import put
from tsparse.stages import Stage
from tsparse.train import checkpoint
from tsparse.train.loop import data_seed, first_rows
from tsparse.train.step import TrainState

TOKENS = 16_384  # of training text that thresholds are found on


def calibrated(stage: Stage, mesh: jax.sharding.Mesh, console: Console) -> Path:
  """The workdir of the stage's model with thresholds, made when it is not there; its text is of the training data."""
  folder, config = stage.folder / "calibrated", stage.config
  if (folder / "thresholds.json").exists():
    return folder
  stored, model = open_model(stage.folder), Transformer(model_config(config))
  shapes, logical = abstract_parameters(model)
  params, tokens = stored.restore(checkpoint.abstract(shapes, sharding.shardings(mesh, logical)))
  text = first_rows(config, mesh, data_seed(config.seed, -1 % 2**31), TOKENS)
  pieces = sum(ffn_layers(model.config).values()) + 1
  with ProgressLine(console, "calibrating", 0, pieces) as bar:
    found = calibrate(model, params, [text], mesh, config.sparsity.calibrate, bar.advance)
  new = copy.deepcopy(config)
  new.model.hidden_thresholds = True
  made = {kind: jnp.asarray(theta) for kind, theta in found.theta.items()}
  state = TrainState(step=jnp.asarray(stored.step), params=put(params, made), opt_state={})

  def record():
    folder.mkdir(exist_ok=True)
    tokenizer_files.keep(config.data.vocabulary, folder, stage.folder)
    files.write(folder / "config.json", files.to_json(new.to_dict()))

  hosts.on_main(record)
  with checkpoint.manager(folder, keep=1) as checkpoints:
    checkpoint.save(checkpoints, state, b"", tokens)
  hosts.on_main(lambda: files.write(folder / "thresholds.json", files.to_json(dataclasses.asdict(found))))
  return folder
