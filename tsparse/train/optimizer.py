"""AdamW with warm-up and cosine decay, clipped by global norm: the recipe of the paper (Turbo Sparse, section 5).

Muon (Jordan 2024) in place of it orthogonalises the momentum M of each matrix of the layers, M = U S V^T -> U V^T by
Newton-Schulz iterations, times 0.2 sqrt(max(rows, columns)), which is the size of AdamW's steps (arXiv 2502.16982), so
that learning rates mean the same. Each expert's matrix is one of its own, the heads of a projection are one together.
Embeddings, head, routers, norms and factors of lora stay with Adam, with Nesterov's momentum and without decay.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib

from tsparse.recipes import thresholds, trained
from tsparse.recipes.lowrank import Factors
from tsparse.sharding import path_name

NOT_DECAYED = r".*(norm|bias|threshold)"  # scales, biases, and thresholds of predictors, which have no gradient
MATRICES = {  # of Muon: the axes that are multiplied with the input and those of the output
  r".*attention/(query|key|value)": optax.contrib.MuonDimensionNumbers(-3, (-2, -1)),  # [L, D, N, H]
  r".*attention/out": optax.contrib.MuonDimensionNumbers((-3, -2), -1),  # [L, N, H, D]
  r".*ffn/(shared/)?(gate|up|down)": optax.contrib.MuonDimensionNumbers(-2, -1),  # [L, D, F] or [L, E, D, F]
}
MUON_RMS = 0.2


def warmup_steps(train: ml_collections.ConfigDict) -> int:
  """The steps of warm-up: those of the config, or where it has no more steps than those all of them but the last."""
  return min(train.warmup_steps, train.steps - 1)


def learning_rate(train: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then cosine to its `final_learning_rate_fraction` at `steps`."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=train.learning_rate,
    warmup_steps=warmup_steps(train),
    decay_steps=train.steps,
    end_value=train.learning_rate * train.final_learning_rate_fraction,
  )


def make_optimizer(
  train: ml_collections.ConfigDict, params: Any, moved: str = "", seed: int = 0
) -> optax.GradientTransformation:
  """The optimizer of `config.train` for parameters of the structure of `params` (arrays or shapes).

  It leaves those alone whose paths the regex `moved` matches: something else moves them. The seed is that of factors of
  lora.
  """
  rules = trained.parse(train.rules)
  found = trained.actions(((moved, 0.0), *rules) if moved else rules, params)
  return thresholds.floored(
    trained.only_trained(clipped(train.clip_norm), OPTIMIZERS[train.optimizer](train), found, seed), found
  )


def clipped(norm: float) -> optax.GradientTransformation:
  """g min(1, norm / |g|), |g| over all gradients: optax.clip_by_global_norm by one factor for all.

  Its quotient g / |g| of each entry is one that XLA writes and reads once more on CPU.
  """

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    found = optax.tree_utils.tree_norm(grads)
    return optax.tree_utils.tree_scale(jnp.where(found < norm, 1.0, norm / found), grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adamw(train: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW; what is not in NOT_DECAYED is decayed."""
  return optax.adamw(learning_rate(train), b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=decayed)


def muon(train: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Muon on MATRICES, Adam with the same learning rate on the rest; `weight_decay` is that of MATRICES."""
  return optax.contrib.muon(
    learning_rate(train),
    weight_decay=train.weight_decay,
    adam_b1=train.b1,
    adam_b2=train.b2,
    muon_weight_dimension_numbers=matrices,
    consistent_rms=MUON_RMS,
  )


OPTIMIZERS: dict[str, Callable[[ml_collections.ConfigDict], optax.GradientTransformation]] = {
  "adamw": adamw,
  "muon": muon,
}


def matrices(params: Any) -> Any:
  """Tree of the entries of MATRICES, None where there is none."""

  def axes(path: Any, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
    return next((axes for pattern, axes in MATRICES.items() if re.fullmatch(pattern, path_name(path))), None)

  return jax.tree_util.tree_map_with_path(axes, params)


def decayed(params: Any) -> Any:
  """Tree of bool: which parameters (of those at hand) have weight decay."""
  return jax.tree_util.tree_map_with_path(lambda path, _: not re.fullmatch(NOT_DECAYED, path_name(path)), params)


def optimizer_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, replicated: Any) -> Any:
  """Shardings of the optimizer state: moments like their parameters, the rest replicated.

  Left to itself `jax.jit(tx.init)` would replicate the moments, because zeros depend on nothing.

  Args:
    tx: the optimizer.
    params: tree of shapes.
    shardings: tree of NamedSharding, one per parameter.
    replicated: the NamedSharding of everything else.
  """
  state = jax.eval_shape(tx.init, params)

  def like(moment: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda _: replicated, moment) if isinstance(moment, Factors) else sharding

  return trained.map_moments(tx, like, state, shardings, others=lambda _: replicated)


def passed(opt_state: Any) -> Any:
  """The optimizer's state after a step that made no update: the counts of its schedules go on, and they alone.

  So the learning rate of a step is that of its number, however many steps before it have made no update.
  """
  schedule = lambda state: isinstance(state, optax.ScaleByScheduleState)  # noqa: E731
  on = lambda state: state._replace(count=state.count + 1) if schedule(state) else state  # noqa: E731
  return jax.tree.map(on, opt_state, is_leaf=schedule)
