"""What `config.sparsity` and the distillation of `config.train` ask for, put together for the training step.

Everything is off by default, and then the step is the one it would be without this package. Values that change in
training (the share of the swap, lambda) are traced: nothing is compiled again.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from tsparse.activations import activation
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, model_config
from tsparse.models.counts import ModelCounts, model_zero_fraction, zero_fraction_per_layer
from tsparse.recipes import guards, hidden, penalties, start, swap, thresholds
from tsparse.recipes.controller import Controller

Array = jax.Array
THRESHOLDS = "thresholds"  # what a target may move in place of the penalty's weight
DENSE = "swiglu"  # what is swapped gradually, and turned over


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Static settings, in steps.

  Attributes:
    model: of the student.
    swap_end: the step at which the activation is the model's own; 0 from the start.
    kind: the penalty, a key of penalties.PENALTIES; "" for none.
    scale: of that penalty.
    stages: (step, lambda) of the schedule, of one stage where it is constant; none with a controller.
    controller: or None.
    distill_weight: w of distill.py; 0 for no teacher.
    temperature: T.
    top_k: of the teacher's logits; 0 for all.
    match_steps: so many first steps train the FFNs alone (match.py).
    dead_after: steps without firing after which a neuron is dead; 0 for no guards.
    revive_every: dead neurons are made anew at every multiple of it; 0 never.
    zeros: the share that thresholds of the hidden are moved to make; 0 leaves them to training.
    per_layer: in each layer.
  """

  model: ModelConfig
  swap_end: int = 0
  kind: str = ""
  scale: float = 1.0
  stages: tuple[tuple[float, float], ...] = ()
  controller: Controller | None = None
  distill_weight: float = 0.0
  temperature: float = 1.0
  top_k: int = 0
  match_steps: int = 0
  dead_after: int = 0
  revive_every: int = 0
  zeros: float = 0.0
  per_layer: bool = False

  @property
  def on(self) -> bool:
    """Whether the training step is another one than without a recipe."""
    return bool(self.swap_end or self.kind or self.teacher or self.dead_after or self.zeros)

  @property
  def teacher(self) -> bool:
    """Whether a teacher is needed."""
    return self.distill_weight > 0 or self.match_steps > 0

  def init(self) -> dict[str, Any] | None:
    """What the recipe remembers from step to step, part of the TrainState; None for nothing."""
    parts = {"controller": self.controller.init()} if self.controller else {}
    parts |= {"idle": guards.init(self.model)} if self.dead_after else {}
    return parts or None

  def intervention(self, step: Array) -> dict[str, hidden.Train] | None:
    """On the hidden of the student; None where there is nothing to do."""
    share = swap.share_at(step, self.swap_end) if self.swap_end else None
    return hidden.everywhere(self.model, share, self.kind, self.scale) if self.swap_end or self.kind else None

  def weights(self, step: Array, memory: dict[str, Any] | None) -> Array | None:
    """lambda of each layer, [L] or [1] float32; None without a penalty."""
    if self.controller:
      return jnp.where(step >= self.controller.begin, jnp.exp(memory["controller"].log_weight), 0.0)
    return penalties.staged(step, self.stages)[None] if self.kind else None

  def remember(self, memory: dict[str, Any] | None, counts: ModelCounts, step: Array) -> dict[str, Any] | None:
    """The memory after a step with these counts."""
    new = {}
    if self.controller:
      alone = self.controller.groups > 1
      zeros = zero_fraction_per_layer(counts) if alone else model_zero_fraction(counts)[None]
      new["controller"] = self.controller.update(memory["controller"], zeros, step)
    if self.dead_after:
      new["idle"] = guards.update(memory["idle"], counts)
    return new or None

  def moved(self, params: Any, counts: ModelCounts) -> Any:
    """The parameters after a step with these counts, thresholds moved if it is the recipe's to do so."""
    return thresholds.followed(params, counts, self.zeros, self.per_layer) if self.zeros else params

  def metrics(self, step: Array, memory: dict[str, Any] | None) -> dict[str, Array]:
    """What is logged of a step, with the memory before it."""
    found = {}
    if self.swap_end:
      found["swap_share"] = swap.share_at(step, self.swap_end)
    if self.kind:
      weights = self.weights(step, memory)
      found["penalty_weight"] = weights[0] if weights.shape == (1,) else weights
    if self.controller:
      state = memory["controller"]
      wanted = self.controller.setpoint(state.start, step)
      found["zeros_wanted"] = wanted[0] if wanted.shape == (1,) else wanted
    return found


def plain(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`config` changed in place to one without a recipe: of a stage that is not to have its parent's."""
  for section, fields in ((config.sparsity, SPARSITY), (config.train, TRAIN)):
    for name, value in fields.items():
      section[name] = value
  return config


def without_start(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`config` changed in place to one whose activation has been swapped, and which has no teacher: that of a phase.

  Its penalty, target and rules stay.
  """
  of_start = {"sparsity": ("start", "swap_until"), "train": [name for name in TRAIN if name != "rules"]}
  for section, names in of_start.items():
    for name in names:
      config[section][name] = (SPARSITY | TRAIN)[name]
  return config


# Field -> its value where it is off. Their meaning: configs/default.py.
SPARSITY = {
  "target": 0.0, "moves": "penalty", "target_by": 0.7, "per_layer": False,
  "penalty": "l1", "penalty_scale": 0.1, "penalty_weight": 0.0,
  "stages": "", "start": "", "swap_until": 0.0, "dead_after": 0, "revive_every": 0,
  "threshold": 0.0, "calibrate": 0.0,
}  # fmt: skip
TRAIN = {
  "rules": "", "distill_weight": 0.0, "distill_temperature": 1.0, "distill_top_k": 0, "distill_teacher": "",
  "match_until": 0.0,
}  # fmt: skip


def recipe_of(config: ml_collections.ConfigDict) -> Recipe:
  """The recipe of a config.

  Raises:
    UserError: a value is out of range, or two contradict each other.
  """
  sparsity, train, model = config.sparsity, config.train, model_config(config)
  for holds, sentence in _requirements(sparsity, train, model):
    if not holds:
      raise UserError(f"config.{sentence}.")
  follow = sparsity.moves == THRESHOLDS
  swap_end, match_steps, by = (
    round(share * train.steps) for share in (sparsity.swap_until, train.match_until, sparsity.target_by)
  )
  kind, stages, controller = "", (), None
  if sparsity.stages:
    stages = penalties.parse_stages(sparsity.stages, train.steps)
  elif sparsity.target and not follow:
    begin, groups = max(swap_end, match_steps), model.num_layers if sparsity.per_layer else 1
    controller = Controller(sparsity.target, begin, by, sparsity.penalty_weight or FIRST_WEIGHT, groups)
  elif sparsity.penalty_weight:
    stages = ((0.0, sparsity.penalty_weight),)
  if stages or controller:
    kind = sparsity.penalty
  return Recipe(
    model,
    swap_end,
    kind,
    sparsity.penalty_scale,
    stages,
    controller,
    train.distill_weight,
    train.distill_temperature,
    train.distill_top_k,
    match_steps,
    sparsity.dead_after,
    sparsity.revive_every,
    sparsity.target if follow else 0.0,
    sparsity.per_layer,
  )


FIRST_WEIGHT = 1e-3  # lambda of a controller at its start, unless the config states another


def _requirements(
  sparsity: ml_collections.ConfigDict, train: ml_collections.ConfigDict, model: ModelConfig
) -> Iterator[tuple[bool, str]]:
  """(whether it holds, what to say where not): the rest of a sentence that begins with "config."."""
  act = model.activation
  for section, name in (("sparsity", "swap_until"), ("train", "match_until"), ("sparsity", "target_by")):
    value = (sparsity if section == "sparsity" else train)[name]
    yield 0 <= value <= 1, f"{section}.{name} is {value} and would end after training: it is a share of its steps"
  for name in ("penalty_weight", "threshold", "dead_after", "revive_every"):
    fits = 0 <= sparsity[name] < float("inf")
    yield fits, f"sparsity.{name} is {sparsity[name]}; it must not be negative, and finite"
  for name in ("target", "calibrate"):
    value = sparsity[name]
    yield 0 <= value < 1, f"sparsity.{name} is {value}: it is a share of zeros, between 0 and 1 (0 asks for none)"
  known = ", ".join(penalties.PENALTIES)
  yield sparsity.penalty in penalties.PENALTIES, f"sparsity.penalty {sparsity.penalty!r} is unknown: choose of {known}"
  scale = sparsity.penalty_scale
  yield 0 < scale < float("inf"), f"sparsity.penalty_scale is {scale}; it must be positive and finite"
  ways = " or ".join(swap.WAYS)
  yield (
    not sparsity.swap_until or act in swap.WAYS,
    f"sparsity.swap_until is {sparsity.swap_until} and config.activation {act}: the way from {DENSE} is to {ways}",
  )
  jumps = model.hidden_thresholds
  yield (
    not sparsity.start or act != DENSE or jumps,
    f"sparsity.start is {sparsity.start!r} and config.activation stays {DENSE}",
  )
  yield (
    THRESHOLDS not in start.parse(sparsity.start) or (jumps and sparsity.target and not sparsity.threshold),
    f"sparsity.start is {sparsity.start!r}: thresholds need config.model.hidden_thresholds and a sparsity.target to be "
    "made for, and no sparsity.threshold",
  )
  yield (
    sparsity.moves in ("penalty", THRESHOLDS),
    f"sparsity.moves {sparsity.moves!r} is unknown: penalty or {THRESHOLDS}",
  )
  if sparsity.moves == THRESHOLDS:
    yield (
      jumps and sparsity.target,
      f"sparsity.moves is {THRESHOLDS}: that needs config.model.hidden_thresholds and a sparsity.target",
    )
    yield (
      not (sparsity.penalty_weight or sparsity.stages),
      f"sparsity.moves is {THRESHOLDS} and there is a penalty, by penalty_weight or stages, which nothing would answer",
    )
  for name in ("target", "stages", "penalty_weight"):
    yield (
      not sparsity[name] or activation(act).exact_zeros or jumps,
      f"sparsity.{name} is {sparsity[name]} and config.activation {act}, whose hidden is never made zero by a penalty: "
      "set config.activation=drelu",
    )
  yield (
    not (sparsity.target and sparsity.stages),
    "sparsity.target and sparsity.stages are both set: either a controller or a schedule moves lambda",
  )
  yield (
    not (sparsity.penalty_weight and sparsity.stages),
    "sparsity.penalty_weight and sparsity.stages are both set: write the weight into the stages",
  )
  yield (
    not sparsity.target or sparsity.target_by > max(sparsity.swap_until, train.match_until),
    f"sparsity.target_by is {sparsity.target_by}: the controller starts after swap_until and match_until and is later",
  )
  yield (
    jumps or not sparsity.threshold,
    "sparsity.threshold is set and the model has none: set config.model.hidden_thresholds too",
  )
  for name in ("swap_until", "calibrate"):
    yield (
      not (jumps and sparsity[name]),
      f"sparsity.{name} and model.hidden_thresholds are both set: thresholds are for an activation that is there, and "
      "are learned or calibrated",
    )
  yield (
    sparsity.dead_after or not sparsity.revive_every,
    "sparsity.revive_every is set and sparsity.dead_after is 0: say after how many steps a neuron is dead",
  )
  yield (
    not (sparsity.revive_every and train.rules),
    "sparsity.revive_every and train.rules are both set: what is frozen cannot be revived",
  )
  weight, temperature, top_k = train.distill_weight, train.distill_temperature, train.distill_top_k
  yield 0 <= weight <= 1, f"train.distill_weight is {weight}; it must be between 0 and 1"
  yield 0 < temperature < float("inf"), f"train.distill_temperature is {temperature}; it must be positive and finite"
  size = model.vocab_size
  yield 0 <= top_k < size, f"train.distill_top_k is {top_k}; it must be below the vocabulary's {size}, 0 takes all"
