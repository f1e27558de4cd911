"""How tokens reach their experts: the steps in which the dropless implementations of models/moe.py differ.

A token that is sent to k experts fills k slots. Each function here takes the choices of the tokens at hand and says how
their rows become slots sorted by expert, which is what grouped products read, and how outputs become tokens again:

    at_home    the experts of all slots are here
    gathered   all tokens of the group of devices come here, and the slots of the experts here are computed
    sent       each slot goes to the device that has its expert, and its output comes back

The last two run inside `jax.shard_map`; a group is the devices along the mesh axis "expert". No slot is ever dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
GROUP = "expert"  # the mesh axis


class Slots(NamedTuple):
  """Slots sorted by expert, those of no expert here last, and the two ways between them and the tokens at hand."""

  sizes: Array  # [E] int32, slots of each expert that is here
  fetch: Callable[[Array], Array]  # rows of the tokens [n, D] -> rows of the slots [S, D]
  deliver: Callable[[Array], Array]  # outputs of the slots [S, D] -> their weighted sums [n, D]


# (experts [n, k] chosen of all, their weights [n, k], number E of experts here) -> slots
Dispatch = Callable[[Array, Array, int], Slots]


def at_home(chosen: Array, weights: Array, experts: int) -> Slots:
  """Nothing travels. A choice at or above `experts` is of none of them.

  The choices of a token differ, so that at most min(k, E) of them are of experts here: so many slots there are.
  """
  n, k = chosen.shape
  order, inverse = _sort(chosen.reshape(-1))
  order = order[: n * min(k, experts)]
  inverse = inverse.reshape(n, k)
  sizes = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(experts), axis=0, dtype=jnp.int32)
  return Slots(
    sizes,
    lambda x: _to_slots(x, order, inverse),
    lambda out: _from_slots(out, weights.astype(out.dtype), order, inverse),
  )


def gathered(chosen: Array, weights: Array, experts: int) -> Slots:
  """Tokens are all-gathered over the group, and the outputs of its devices added up where their tokens live."""

  def gather(rows: Array) -> Array:
    return jax.lax.all_gather(rows, GROUP, tiled=True)

  chosen = gather(chosen) - jax.lax.axis_index(GROUP) * experts  # to the numbers of the experts here
  chosen = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts)
  slots = at_home(chosen, gather(weights), experts)
  return Slots(
    slots.sizes,
    lambda x: slots.fetch(gather(x)),
    lambda out: jax.lax.psum_scatter(slots.deliver(out), GROUP, tiled=True),
  )


def sent(chosen: Array, weights: Array, experts: int) -> Slots:
  """Slots travel to their experts and back by `jax.lax.ragged_all_to_all`, which XLA has for TPU and not for CPU.

  A device receives into a buffer for the worst case, group n min(k, E) rows: the k experts of a token differ, so at
  most min(k, E) of them are here. What travels is what is needed, k rows of D for a token each way, none for padding.
  """
  group, here = jax.lax.axis_size(GROUP), jax.lax.axis_index(GROUP)
  n, k = chosen.shape
  home = at_home(chosen, weights, group * experts)
  sizes = jax.lax.all_gather(home.sizes, GROUP).reshape(group, group, experts)  # [source, owner, E]
  rows = sizes.sum(-1)  # [source, owner]
  leaves, lands = _starts(rows, axis=1), _starts(rows, axis=0)  # where they are at their source, and at their owner

  # They arrive by source and then by expert, and are wanted by expert.
  arrived = sizes[:, here]  # [source, E]
  ends = jnp.cumsum(arrived.reshape(-1))
  room = group * n * min(k, experts)
  part = jnp.searchsorted(ends, jnp.arange(room), side="right", method="compare_all")
  order, inverse = _sort(jnp.where(part < ends.size, part % experts, experts))

  def travel(x: Array, room: int, *where: Array) -> Array:
    return jax.lax.ragged_all_to_all(x, jnp.zeros((room, x.shape[1]), x.dtype), *where, axis_name=GROUP)

  def fetch(x: Array) -> Array:
    x = travel(home.fetch(x), room, leaves[here], rows[here], lands[here], rows[:, here])
    return _permute(x, order, inverse)

  def deliver(out: Array) -> Array:
    out = _permute(out, inverse, order)
    return home.deliver(travel(out, n * k, lands[:, here], rows[:, here], leaves[:, here], rows[here]))

  return Slots(arrived.sum(0), fetch, deliver)


def _starts(sizes: Array, axis: int) -> Array:
  return jnp.cumsum(sizes, axis) - sizes


def _sort(keys: Array) -> tuple[Array, Array]:
  """The stable permutation that sorts keys [S], and its inverse."""
  order = jnp.argsort(keys, stable=True)
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
  return order, inverse


def _take(x: Array, index: Array) -> Array:
  """x[index], 0 where `index` is beyond the rows of x."""
  return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _permute(x: Array, order: Array, inverse: Array) -> Array:
  """x[order], and 0 where there is no such row; `inverse` is the way back.

  The gradient is a gather by the inverse permutation: the scatter JAX would make is serial on CPU.
  """
  del inverse
  return _take(x, order)


_permute.defvjp(
  lambda x, order, inverse: (_take(x, order), inverse),
  lambda inverse, dout: (_take(dout, inverse), None, None),
)


def _sum_of_slots(slots: Array, weights: Array, places: Array) -> Array:
  """sum over j of weights[:, j] slots[places[:, j]], [n, D], added up in float32.

  Choice by choice, which XLA fuses: all k rows of all tokens, [n, k, D], would be written and read again on CPU.
  """
  rows = (_take(slots, place).astype(jnp.float32) for place in places.T)
  return sum(row * weight[:, None] for row, weight in zip(rows, weights.T, strict=True)).astype(slots.dtype)


@jax.custom_vjp
def _to_slots(x: Array, order: Array, inverse: Array) -> Array:
  """x [n, D] -> [S, D]: each row once for each of its choices, in the order of the slots; `inverse` is [n, k]."""
  return x[order // inverse.shape[1]]


_to_slots.defvjp(
  lambda x, order, inverse: (_to_slots(x, order, inverse), inverse),
  lambda inverse, dout: (_sum_of_slots(dout, jnp.ones(inverse.shape), inverse), None, None),
)


@jax.custom_vjp
def _from_slots(slots: Array, weights: Array, order: Array, inverse: Array) -> Array:
  """[S, D] -> [n, D]: the sum of each token's slots, weighted by [n, k]."""
  del order
  return _sum_of_slots(slots, weights, inverse)


def _from_slots_backward(saved: tuple[Array, ...], dout: Array) -> tuple[Array, Array, None, None]:
  slots, weights, order, inverse = saved
  dout = _to_slots(dout, order, inverse)
  dweights = jnp.einsum("sd,sd->s", slots, dout, preferred_element_type=jnp.float32)
  return dout * weights.reshape(-1)[order][:, None], _take(dweights, inverse).astype(weights.dtype), None, None


_from_slots.defvjp(lambda *args: (_from_slots(*args), args), _from_slots_backward)
