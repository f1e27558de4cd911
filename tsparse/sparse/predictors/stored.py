"""Trained neuron predictors in a folder, beside their model (MODEL/predictors) or anywhere else.

predictors.safetensors   fc1 [R, D], fc2 [F, R] and threshold [1] of each layer (and expert), by the names that a
                         TurboSparse checkpoint gives those merged into it: model.layers.3.mlp.predictor.fc1.weight
predictors.json          which model they are for, their ranks and input, the recall they were made for
checksums.json           of the first

Read, they are the parameters that models/transformer.py has for merged ones: `merge` puts them into a model.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsparse import checksums, files
from tsparse.convert import rules
from tsparse.convert.families import LAYER, PLAIN_EXPERTS, PREDICTORS, within
from tsparse.convert.huggingface import unreadable, verify
from tsparse.convert.leaf import Leaf, cast
from tsparse.convert.model import Model, place_leaves
from tsparse.convert.rules import Rule
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig

FOLDER, WEIGHTS, FACTS = "predictors", "predictors.safetensors", "predictors.json"
SIZES = ("num_layers", "d_model", "d_ff", "num_experts", "experts_per_token")  # that must be those of the model
GATE, THRESHOLD = "layers/ffn/gate", "layers/ffn/predictor/threshold"
RULES = (*PREDICTORS, Rule(THRESHOLD, LAYER + "mlp.predictor.threshold", "1 -> "))
SAMPLED = 32  # gate weights of the first and of the last layer that tell models apart


@dataclasses.dataclass(frozen=True)
class Predictors:
  """Predictors as they are stored.

  Attributes:
    folder: where.
    leaves: path of a parameter (models/transformer.py) -> its values.
    ranks: of each layer.
    source: what they read, before_norm or after_norm.
    recall: that their thresholds were chosen for.
    read: weights of the FFNs read for one token, see quality.DEFINITIONS: dense, exact, predictor.
  """

  folder: Path
  leaves: Mapping[str, Leaf]
  ranks: tuple[int, ...]
  source: str
  recall: float
  read: Mapping[str, float]


def rules_of(config: ModelConfig) -> tuple[Rule, ...]:
  """The tensors of the predictors of a model."""
  if not config.num_experts:
    return RULES
  gate = next(rule.theirs for rule in PLAIN_EXPERTS if rule.ours == GATE)
  return within(RULES, LAYER + "mlp.", gate.removesuffix("gate_proj.weight"))


def with_predictors(config: ModelConfig, ranks: tuple[int, ...], source: str) -> ModelConfig:
  """The model with such predictors in it, each with its threshold."""
  return dataclasses.replace(config, predictor_ranks=ranks, predictor_input=source, predictor_thresholds=True)


def without_predictors(config: ModelConfig) -> ModelConfig:
  """The model without."""
  return dataclasses.replace(config, predictor_ranks=(), predictor_input="", predictor_thresholds=False)


def sample(leaves: Mapping[str, Leaf]) -> list[float]:
  """Some gate weights of the first and of the last layer, of the first expert."""
  gate = leaves[GATE]
  inner = (0,) * (len(gate.shape) - 3)
  parts = (gate.at((layer, *inner)).reshape(-1) for layer in (0, gate.shape[0] - 1))
  return [float(x) for part in parts for x in part[:: max(1, part.size // SAMPLED)][:SAMPLED]]


def save(
  folder: Path, model: Model, config: ModelConfig, weights: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
  """Writes predictors.

  Args:
    folder: exists.
    model: that they were trained for.
    config: with_predictors of its config.
    weights: fc1, fc2, threshold as models/transformer.py lays them out.
    facts: more for predictors.json: "recall" and "read", see `Predictors`.

  Raises:
    OSError: the disk is full, or fails otherwise.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import save_file

  def leaf(array: np.ndarray) -> Leaf:
    return Leaf(array.shape, np.dtype(np.float32), 0, lambda _: array)

  leaves = {f"layers/ffn/predictor/{name}": leaf(np.asarray(x, np.float32)) for name, x in weights.items()}
  tensors = rules.to_theirs(rules_of(config), config, leaves)
  try:
    save_file({name: tensor.read(()) for name, tensor in tensors.items()}, folder / WEIGHTS)
  except SafetensorError as error:
    raise OSError(str(error).rpartition(": ")[2]) from error
  checksums.write(folder, [WEIGHTS])
  files.by_umask(folder / WEIGHTS)
  which = {"sizes": {name: getattr(config, name) for name in SIZES}, "gate": sample(model.leaves()[0])}
  how = {"predictor_ranks": list(config.predictor_ranks), "predictor_input": config.predictor_input}
  files.write(folder / FACTS, files.to_json({"model": which, **how, **facts}))


def beside(model: Path) -> Path | None:
  """The folder of predictors beside a model, if there is one."""
  folder = model / FOLDER
  return folder if (folder / FACTS).is_file() else None


def load(folder: Path, model: Model) -> Predictors:
  """The predictors in a folder.

  Raises:
    UserError: there are none, they are damaged, or they were trained for another model.
  """
  try:
    facts = json.loads((folder / FACTS).read_text())
    which, ranks, source = facts["model"], tuple(facts["predictor_ranks"]), facts["predictor_input"]
    sizes, gate, recall, read = which["sizes"], np.array(which["gate"], float), float(facts["recall"]), facts["read"]
  except FileNotFoundError:
    raise UserError(
      f"{folder} holds no predictors (no {FACTS}): make some by experiments/predictors.py --model={model.path}."
    ) from None
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f"{folder / FACTS} cannot be read ({error}): train the predictors again.") from None
  own = {name: getattr(model.config, name) for name in SIZES}
  wrong = next((name for name in SIZES if sizes.get(name) != own[name]), None)
  if wrong:
    raise UserError(
      f"the predictors in {folder} were trained for a model with {wrong} = {sizes.get(wrong)}, and {model.path} has "
      f"{own[wrong]}: train its own by experiments/predictors.py."
    )
  here = np.array(sample(model.leaves()[0]))
  if gate.shape != here.shape or not np.allclose(gate, here, rtol=2**-6, atol=1e-6):  # bfloat16 rounds by 2^-9
    raise UserError(
      f"the predictors in {folder} were trained for another model than {model.path}, whose gate weights differ: train "
      "its own by experiments/predictors.py."
    )
  config = with_predictors(without_predictors(model.config), ranks, source)
  return Predictors(folder, _leaves(folder / WEIGHTS, config), ranks, source, recall, read)


def _leaves(path: Path, config: ModelConfig) -> dict[str, Leaf]:
  from safetensors import SafetensorError, safe_open

  verify(path.parent, "train the predictors again")
  try:
    with safe_open(path, framework="np") as opened:
      tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  except (SafetensorError, FileNotFoundError) as error:
    raise UserError(f"{path} is damaged ({error}): train the predictors again.") from None
  except OSError as error:
    raise unreadable(path, error) from None
  ours = rules_of(config)
  rules.check_names(ours, config, tensors)
  shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
  return rules.to_ours(ours, config, shapes, tensors.__getitem__)


def merge(model: Model, predictors: Predictors) -> Model:
  """The model with these predictors in place of any of its own, fc1 and fc2 in the dtype of its gate weights."""

  def leaves() -> tuple[dict[str, Leaf], int]:
    own, tokens = model.leaves()
    dtype = own[GATE].dtype
    added = {name: leaf if name == THRESHOLD else cast(leaf, dtype) for name, leaf in predictors.leaves.items()}
    return {**own, **added}, tokens

  config = with_predictors(without_predictors(model.config), predictors.ranks, predictors.source)

  def restore(target: Any) -> tuple[Any, int]:
    every, tokens = leaves()
    return place_leaves(every, target), tokens

  return dataclasses.replace(model, config=config, leaves=leaves, restore=restore)
