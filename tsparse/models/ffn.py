"""The gated FFN and the counts taken on its hidden, the tensor the whole project is about."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tsparse.activations import KEPT_MASK
from tsparse.models.counts import HiddenCounts, count_fired, count_fired_by_token, sum_penalty
from tsparse.models.layers import project
from tsparse.sharding import constrain

Array = jax.Array
# What may be done to the hidden before `down` reads it: (gate, up, hidden, expert) -> hidden, all [..., F] but expert,
# int32 that broadcasts to [...]: whose rows they are; None in a dense FFN. See analysis/masks. It may also have a
# method `on_input`, which changes what gate and up read (`ffn_input`), an attribute `penalty`, a function of the hidden
# whose sums are counted (`penalty_of`), and an attribute `elementwise`, true where entries do not depend on each other.
Intervention = Callable[[Array, Array, Array, Array | None], Array]


def ffn_input(x: Array, intervene: Intervention | None) -> Array:
  """What gate and up read of x [B, T, D], the same for all experts: intervene.on_input(x) if there is such a method."""
  on_input = getattr(intervene, "on_input", None)
  return x if on_input is None else on_input(x)


def penalty_of(intervene: Intervention | None) -> Callable[[Array], Array] | None:
  """hidden [..., F] -> the penalty of each entry, if the intervention has one."""
  return getattr(intervene, "penalty", None)


def gated_hidden(
  gate: Array,
  up: Array,
  activation: Callable[[Array, Array], Array],
  predicted: Array | None,
  intervene: Intervention | None,
  expert: Array | None = None,
) -> Array:
  """act(gate, up) [..., F], times the predictor's mask if there is one, and then the intervention if there is one."""
  # without jax.checkpoint all that the derivative needs would be kept, as much as gate and up again
  policy = jax.checkpoint_policies.save_only_these_names(KEPT_MASK)
  hidden = jax.checkpoint(activation, policy=policy, prevent_cse=False)(gate, up)
  if predicted is not None:
    hidden = hidden * predicted
  return hidden if intervene is None else intervene(gate, up, hidden, expert)


def feed_forward(
  x: Array,
  gate: Array,
  up: Array,
  down: Array,
  valid: Array,
  activation: Callable[[Array, Array], Array],
  predicted: Array | None = None,
  intervene: Intervention | None = None,
  by_token: bool = False,
) -> tuple[Array, HiddenCounts]:
  """down(act(x gate, x up)): Turbo Sparse (arXiv 2406.05955) eq. 1-2.

  Args:
    x: [B, T, D].
    gate: [D, F].
    up: [D, F].
    down: [F, D].
    valid: [B, T] bool, false on padding, which is computed but not counted.
    activation: (gate, up) -> hidden.
    predicted: optional mask [B, T, F] of the hidden (models/predictor.py).
    intervene: optional change of the hidden.
    by_token: fill in the `by_token` of the counts.

  Returns:
    [B, T, D], and counts with E = 1.
  """
  gate, up = project("btd,df->btf", x, gate), project("btd,df->btf", x, up)
  hidden = constrain(gated_hidden(gate, up, activation, predicted, intervene), "BTF")  # [B, T, F]
  counts = HiddenCounts(
    fired=count_fired(hidden, valid)[None],
    routed=jnp.sum(valid, dtype=jnp.float32)[None],
    by_token=count_fired_by_token(hidden, valid) if by_token else None,
    penalty=sum_penalty(penalty, hidden, valid)[None] if (penalty := penalty_of(intervene)) else None,
  )
  return project("btf,fd->btd", hidden, down), counts
