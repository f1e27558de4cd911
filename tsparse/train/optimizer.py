"""AdamW with warm-up and cosine decay, clipped by global norm: the recipe of the paper (Turbo Sparse, section 5)."""

from typing import Any

import jax
import ml_collections
import optax

from tsparse.sharding import match

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
  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    optax.adamw(
      learning_rate(train),
      b1=train.b1,
      b2=train.b2,
      weight_decay=train.weight_decay,
      mask=match([(NOT_DECAYED, False), (r".*", True)], params),
    ),
  )


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
  return optax.tree_utils.tree_map_params(
    tx, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: replicated
  )
