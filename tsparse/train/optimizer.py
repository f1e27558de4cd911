"""AdamW with warm-up and cosine decay, clipped by global norm: the recipe of the paper (Turbo Sparse, section 5)."""

import re
from typing import Any

import jax
import ml_collections
import optax

from tsparse.recipes import trained
from tsparse.recipes.lowrank import Factors
from tsparse.sharding import path_name

NOT_DECAYED = r".*(norm|bias|threshold)"  # scales, biases, and thresholds of predictors, which have no gradient


def learning_rate(train: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear from 0 over `warmup_steps`, then cosine to its `final_learning_rate_fraction` at `steps`."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=train.learning_rate,
    warmup_steps=train.warmup_steps,
    decay_steps=train.steps,
    end_value=train.learning_rate * train.final_learning_rate_fraction,
  )


def make_optimizer(train: ml_collections.ConfigDict, params: Any) -> optax.GradientTransformation:
  """The optimizer of `config.train` for parameters of the structure of `params` (arrays or shapes)."""
  adamw = optax.adamw(
    learning_rate(train),
    b1=train.b1,
    b2=train.b2,
    weight_decay=train.weight_decay,
    mask=decayed,
  )
  found = trained.actions(trained.parse(train.rules), params)
  return trained.only_trained(optax.clip_by_global_norm(train.clip_norm), adamw, found)


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
    if isinstance(moment, optax.MaskedNode):  # of a parameter that is not trained
      return moment
    return jax.tree.map(lambda _: replicated, moment) if isinstance(moment, Factors) else sharding

  return optax.tree_utils.tree_map_params(
    tx,
    like,
    state,
    shardings,
    transform_non_params=lambda _: replicated,
    is_leaf=lambda x: isinstance(x, (optax.MaskedNode, Factors)),
  )
