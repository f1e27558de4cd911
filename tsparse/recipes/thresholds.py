"""Thresholds of the hidden that a recipe gives a model: in the parameters it starts from, in training, or after it.

In training (`config.sparsity.moves="thresholds"`) all layers' thresholds follow the zeros of each batch,

    log theta += RATE (target - zeros)          zeros of the model, or per_layer those of the layer

which is stochastic approximation of a quantile (Robbins and Monro 1951), theta at least LEAST. They have no gradient,
and no penalty is needed; with `sparsity.start="thresholds"` the asked share is zero from the first step to the last.

Otherwise thresholds are learned like other parameters (models/threshold.py), but projected: an update takes none below
LEAST. At 0 the window in which a threshold has a gradient is empty, and it would stay there.

After training (analysis/calibrate.py) each layer gets the threshold that, with those of the others, makes the asked
share of zeros at the least loss: levels are raised one layer at a time, always where the next one costs least, as TEAL
does greedily in each block (arXiv 2408.14690, where the cost is the error of the block's output). The cost of a level
is here the loss with this layer alone at it; the costs of layers are taken to add up.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tsparse.models.config import ModelConfig
from tsparse.models.counts import HiddenCounts, ModelCounts, mean_zero_fraction, model_zero_fraction
from tsparse.models.ffn_params import ffn_of, with_ffn
from tsparse.sharding import path_name


def without(tree: Any) -> Any:
  """Parameters (or shapes) without the thresholds."""
  if not isinstance(tree, Mapping):
    return tree
  of_ffn = {"gate", "up", "down"} <= set(tree)
  return {name: without(leaf) for name, leaf in tree.items() if not (of_ffn and name == "threshold")}


def put(params: Any, theta: Mapping[str, Any]) -> Any:
  """Parameters with the thresholds of the layers of each kind of FFN, [L] each."""
  for kind, values in theta.items():
    params = with_ffn(params, kind, {"threshold": values})
  return params


def restored_with(
  restore: Callable[[Any], tuple[Any, int]], source: ModelConfig, kinds: Mapping[str, int], value: float
) -> Callable[[Any], tuple[Any, int]]:
  """`restore` of a model of `source` for one that has thresholds: they are `value` where the source has none.

  Args:
    restore: (target) -> (parameters, tokens seen).
    source: what is stored.
    kinds: number of layers of each kind of FFN.
    value: of the thresholds.
  """

  def restored(target: Any) -> tuple[Any, int]:
    if source.hidden_thresholds or without(target) == target:
      return restore(target)
    params, tokens = restore(without(target))
    full = {
      kind: jax.device_put(jnp.full((length,), value, jnp.float32), ffn_of(target, kind)["threshold"].sharding)
      for kind, length in kinds.items()
    }
    return put(params, full), tokens

  return restored


PATHS = r"(layers|first)/ffn/(shared/)?threshold"  # of the thresholds among the parameters
LEAST = 1e-4  # of a threshold that is moved or learned
RATE = 0.1  # a quarter or so of the hidden lies within a factor e of the threshold: an error is halved in 30 steps


def floored(tx: optax.GradientTransformation, actions: Any) -> optax.GradientTransformation:
  """`tx`, whose updates leave no threshold that is learned below LEAST.

  Args:
    tx: the optimizer of all parameters.
    actions: tree of the actions of trained.py; what has 0 is not touched.
  """

  def floor(path: Any, update: jax.Array, theta: jax.Array, action: float) -> jax.Array:
    learned = action and re.fullmatch(PATHS, path_name(path))
    return jnp.maximum(theta + update, LEAST) - theta if learned else update

  def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    return jax.tree_util.tree_map_with_path(floor, updates, params, actions), state

  return optax.GradientTransformation(tx.init, update)


def learned(rules: Sequence[tuple[str, float | int]]) -> bool:
  """Whether thresholds are trained by these rules of trained.py."""
  return next((bool(action) for pattern, action in rules if re.fullmatch(pattern, "layers/ffn/threshold")), False)


def followed(params: Any, counts: ModelCounts, target: float, per_layer: bool) -> Any:
  """`params` with the thresholds after a batch of these counts."""
  one = model_zero_fraction(counts)

  def theta(kind: str, seen: HiddenCounts) -> jax.Array:
    zeros = mean_zero_fraction(seen, 1) if per_layer else one  # [L] or []
    return jnp.maximum(ffn_of(params, kind)["threshold"], LEAST) * jnp.exp(RATE * (target - zeros))

  return put(params, {kind: theta(kind, seen) for kind, seen in counts.items()})


def greedy(costs: np.ndarray, zeros: np.ndarray, weights: np.ndarray, target: float) -> np.ndarray:
  """The level of each layer, [N] int: raised one at a time where a zero more costs least, until the target is met.

  Args:
    costs: [N, G], loss of the model with layer n alone at level g; its first column that of the model as it is.
    zeros: [N, G], zeros of layer n at level g, not falling.
    weights: [N], share of the entries of the hidden that are the layer's.
    target: share of zeros of the model.
  """
  costs = np.maximum.accumulate(costs, axis=1)  # noise apart a higher level does not cost less
  at = np.zeros(len(costs), int)
  rows = np.arange(len(costs))
  while weights @ zeros[rows, at] < target - 1e-9:
    step = np.minimum(at + 1, costs.shape[1] - 1)
    gained = weights * (zeros[rows, step] - zeros[rows, at])
    price = np.where(gained > 0, (costs[rows, step] - costs[rows, at]) / np.maximum(gained, 1e-12), np.inf)
    price = np.where((gained <= 0) & (step > at), -np.inf, price)  # a level that is met already is free
    if np.all(step == at):
      break
    at[np.argmin(np.where(step > at, price, np.inf))] += 1
  return at


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """What a calibration found.

  Attributes:
    theta: by kind of FFN, [L] float32.
    zeros: share that each layer is to have, in the order of theta.
    target: what was asked for.
  """

  theta: dict[str, np.ndarray]
  zeros: Sequence[float]
  target: float
