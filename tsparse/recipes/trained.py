"""What is trained: (regex, action) rules over the paths of the parameters, the first that matches counts.

    config.train.rules = ".*norm=0.1; (layers|first)/ffn/.*=1; layers/attention/.*=lora:8; .*=0"

    NUMBER   the learning rate is multiplied by it; 0 freezes: no update, no decay, no moments in memory
    lora:R   the parameter changes by a matrix of rank R alone (lowrank.py)

"" trains everything. A parameter that no rule matches, and a rule that is the first match of none, are errors.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from tsparse.errors import UserError
from tsparse.recipes.lowrank import Factors, low_rank
from tsparse.sharding import match

EVERYTHING = ((".*", 1.0),)


def parse(text: str) -> tuple[tuple[str, float | int], ...]:
  """(regex, action) pairs: a float multiplies the learning rate, an int is a rank. UserError for another form."""
  rules = []
  for rule in filter(None, (part.strip() for part in text.split(";"))):
    pattern, equals, action = rule.rpartition("=")
    number = re.fullmatch(r"lora:(\d+)|(\d+\.?\d*(?:e-?\d+)?)", action.strip())
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f"config.train.rules: {pattern!r} is no regular expression ({error}).") from None
    if not equals or not number or number[1] == "0":
      raise UserError(
        f"config.train.rules: {rule!r} is not REGEX=ACTION; an action is a number, which multiplies the learning rate "
        "(0 freezes), or lora:RANK."
      )
    rules.append((pattern.strip(), int(number[1]) if number[1] else float(number[2])))
  return tuple(rules) or EVERYTHING


def actions(rules: Sequence[tuple[str, float | int]], params: Any) -> Any:
  """Tree of actions for `params`; UserError for a rule that matches nothing, a parameter without one, or all frozen."""
  try:
    found = match(rules, params)
  except UserError as error:
    raise UserError(f"config.train.rules: {error}") from None
  if not any(jax.tree.leaves(found)):
    raise UserError("config.train.rules freezes every parameter: there is nothing left to train.")
  leaves = zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True)
  if any(isinstance(action, int) and leaf.ndim < 3 for leaf, action in leaves):
    raise UserError(
      "config.train.rules: lora is for the matrices of layers, [L, ...]; give vectors and embed a number."
    )
  return found


def frozen(found: Any) -> Any:
  """Tree of bool: which parameters never change."""
  return jax.tree.map(lambda action: isinstance(action, float) and action == 0, found)


def only_trained(
  clip: optax.GradientTransformation, inner: optax.GradientTransformation, found: Any, seed: int = 0
) -> optax.GradientTransformation:
  """`clip`, then `inner`, on the parameters that are trained, and the updates times the multipliers of `found`.

  The norm that is clipped is that of the gradients of trained parameters (of lora those of the whole matrices, whose
  first factors are drawn by the seed).
  """
  if all(action == 1.0 and isinstance(action, float) for action in jax.tree.leaves(found)):
    return optax.chain(clip, inner)
  whole = jax.tree.map(lambda action: action != 0 and isinstance(action, float), found)
  ranks = {action for action in jax.tree.leaves(found) if isinstance(action, int)}
  parts = [optax.masked(optax.set_to_zero(), frozen(found)), clip, optax.masked(inner, whole)]
  for rank in sorted(ranks):
    of_rank = jax.tree.map(lambda action, rank=rank: isinstance(action, int) and action == rank, found)
    parts.append(optax.masked(low_rank(inner, rank, seed), of_rank))
  scale = optax.stateless(
    lambda updates, _: jax.tree.map(lambda u, a: u * a if isinstance(a, float) else u, updates, found)
  )
  return optax.chain(*parts, scale)


def map_moments(
  tx: optax.GradientTransformation,
  function: Callable[..., Any],
  opt_state: Any,
  *trees: Any,
  others: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
  """The optimizer state with `function` of each moment and of its parameter's part of `trees`; `others` of the rest.

  A moment of a low-rank parameter is given as its Factors. A parameter that is not trained, or that another part of
  the optimizer has, has none: its optax.MaskedNode stays.
  """

  def of_trained(moment: Any, *parts: Any) -> Any:
    return moment if isinstance(moment, optax.MaskedNode) else function(moment, *parts)

  return optax.tree_utils.tree_map_params(
    tx,
    of_trained,
    opt_state,
    *trees,
    transform_non_params=others,
    is_leaf=lambda x: isinstance(x, (optax.MaskedNode, Factors)),
  )
