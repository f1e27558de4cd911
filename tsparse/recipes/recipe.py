"""What `config.sparsity` and the distillation of `config.train` ask for, put together for the training step.

Everything is off by default, and then the step is the one it would be without this package. Values that change in
training (the share of the swap, lambda) are traced: nothing is compiled again.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from tsparse.activations import activation
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, model_config
from tsparse.models.counts import ModelCounts, model_zero_fraction, zero_fraction_per_layer
from tsparse.recipes import guards, hidden, penalties, start, swap
from tsparse.recipes.controller import Controller

Array = jax.Array
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

  @property
  def on(self) -> bool:
    """Whether the training step is another one than without a recipe."""
    return bool(self.swap_end or self.kind or self.teacher or self.dead_after)

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
  "target": 0.0, "target_by": 0.7, "per_layer": False, "penalty": "l1", "penalty_scale": 0.1, "penalty_weight": 0.0,
  "stages": "", "start": "", "swap_until": 0.0, "dead_after": 0, "revive_every": 0,
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

  def require(holds: bool, sentence: str):
    if not holds:
      raise UserError(f"config.{sentence}.")

  def share(section: str, name: str) -> int:
    value = getattr(config, section)[name]
    require(0 <= value <= 1, f"{section}.{name} is {value}: it is a share of the training steps and would end after training")
    return round(value * train.steps)

  start.parse(sparsity.start)
  zeros = activation(model.activation).exact_zeros
  swap_end, match_steps, by = share("sparsity", "swap_until"), share("train", "match_until"), share("sparsity", "target_by")
  if sparsity.swap_until or sparsity.start:
    field = "swap_until" if sparsity.swap_until else "start"
    require(model.activation in swap.WAYS or field == "start" and model.activation != DENSE,
            f"sparsity.{field} is {sparsity[field]} and config.activation {model.activation}: there is a way from {DENSE} "
            f"to {' and '.join(swap.WAYS)} only")  # fmt: skip
  require(sparsity.penalty in penalties.PENALTIES,
          f"sparsity.penalty {sparsity.penalty!r} is unknown, choose one of {', '.join(penalties.PENALTIES)}")  # fmt: skip
  for name in ("penalty_weight", "dead_after", "revive_every"):
    require(0 <= sparsity[name] < float("inf"), f"sparsity.{name} is {sparsity[name]}; it must not be negative, and finite")
  require(0 < sparsity.penalty_scale < float("inf"), f"sparsity.penalty_scale is {sparsity.penalty_scale}; it must be positive")
  target, weight = sparsity.target, sparsity.penalty_weight
  require(target == 0 or 0 < target < 1, f"sparsity.target is {target}: it is a share of zeros, between 0 and 1 (0 for none)")
  penalised = bool(target or weight or sparsity.stages)
  require(zeros or not penalised,
          f"sparsity.{'target' if target else 'stages' if sparsity.stages else 'penalty_weight'} is set and "
          f"config.activation is {model.activation}, whose hidden is never exactly zero: set config.activation=drelu")  # fmt: skip
  require(not (target and sparsity.stages),
          "sparsity.target and config.sparsity.stages are both set: a controller or a schedule moves lambda, not both")  # fmt: skip
  require(not (weight and sparsity.stages),
          "sparsity.penalty_weight and config.sparsity.stages are both set: write the weight into the stages")  # fmt: skip
  stages, controller, begin = ((0.0, weight),), None, max(swap_end, match_steps)
  if sparsity.stages:
    stages = penalties.parse_stages(sparsity.stages, train.steps)
  if target:
    require(by > begin, f"sparsity.target_by is {sparsity.target_by}: the target must be reached after the swap and the "
            "matching, of which one ends no earlier")  # fmt: skip
    groups = model.num_layers if sparsity.per_layer else 1
    stages, controller = (), Controller(target, begin, by, weight or 1e-3, groups)
  require(not sparsity.revive_every or sparsity.dead_after,
          "sparsity.revive_every is set and config.sparsity.dead_after is 0: say after how many steps a neuron is dead")  # fmt: skip
  require(not (sparsity.revive_every and train.rules),
          "sparsity.revive_every and config.train.rules are both set: what is frozen cannot be revived")  # fmt: skip
  require(0 <= train.distill_weight <= 1, f"train.distill_weight is {train.distill_weight}; it must be between 0 and 1")
  require(0 < train.distill_temperature < float("inf"),
          f"train.distill_temperature is {train.distill_temperature}; it must be positive and finite")  # fmt: skip
  require(0 <= train.distill_top_k < model.vocab_size,
          f"train.distill_top_k is {train.distill_top_k}; it must be below the vocabulary's {model.vocab_size}, 0 is all")  # fmt: skip
  return Recipe(
    model, swap_end, sparsity.penalty if penalised else "", sparsity.penalty_scale, stages if penalised else (), controller,
    train.distill_weight, train.distill_temperature, train.distill_top_k, match_steps, sparsity.dead_after,
    sparsity.revive_every,
  )  # fmt: skip
