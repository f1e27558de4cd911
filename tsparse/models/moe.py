"""Mixture of experts after Mixtral (arXiv 2401.04088): the router, and the implementations, one table over one tree.

    dense          every expert on every token: E / experts_per_token times the work, and obviously right; the oracle
    ragged         each token's choices sorted by expert, two grouped products and no dropped token; a device computes
                   its own tokens and gathers the experts' weights, over the mesh's expert axis too
    ep_allgather   the same, and experts stay where they are: tokens are gathered over the expert axis, each device
                   computes the choices of its experts, and the outputs are added up where their tokens live

Padding is routed nowhere and its output is 0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tsparse import sharding
from tsparse.models.counts import HiddenCounts, count_fired
from tsparse.models.ffn import Intervention, gated_hidden
from tsparse.models.grouped import grouped_matmul, membership
from tsparse.models.predictor import predict, straight_through
from tsparse.sharding import constrain

Array = jax.Array


class Experts(NamedTuple):
  """Weights of E experts in the compute dtype, each a gated FFN: gate, up [E, D, F], down [E, F, D]."""

  gate: Array
  up: Array
  down: Array


class Predictors(NamedTuple):
  """One neuron predictor for each expert (models/predictor.py) and what they read: fc1 [E, D, R], fc2 [E, R, F]."""

  fc1: Array
  fc2: Array
  x: Array  # [B, T, D]


def route(
  x: Array, router: Array, valid: Array, experts_per_token: int, renormalize: bool = True
) -> tuple[Array, Array]:
  """The experts of each token, [B, T, k] int32, and their weights, [B, T, k] float32. Padding gets expert E, weight 0.

  In float32. A weight may underflow to 0; its expert is chosen all the same.

  Args:
    x: [B, T, D].
    router: [D, E] float32.
    valid: [B, T] bool, false on padding.
    experts_per_token: k, experts each token is sent to; ties go to the lower index.
    renormalize: softmax over the chosen logits (Mixtral), which equals the softmax over all renormalised to the chosen;
      if not, softmax over all, so that the weights of a token sum to less than 1 (OLMoE).
  """
  logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router)
  top, index = jax.lax.top_k(logits, experts_per_token)  # [B, T, k]
  weights = jax.nn.softmax(top, axis=-1) if renormalize else jnp.exp(top - jax.nn.logsumexp(logits, -1, keepdims=True))
  real = valid[..., None]
  return jnp.where(real, index, router.shape[1]), jnp.where(real, weights, 0)


def moe(
  impl: str,
  x: Array,
  router: Array,
  experts: Experts,
  valid: Array,
  activation: Callable[[Array, Array], Array],
  experts_per_token: int,
  renormalize: bool = True,
  predictors: Predictors | None = None,
  intervene: Intervention | None = None,
) -> tuple[Array, HiddenCounts]:
  """sum over the chosen experts e of weight_e down_e(act(x gate_e, x up_e)): the same numbers by any implementation.

  Args:
    impl: a key of IMPLEMENTATIONS.
    x: [B, T, D].
    router: [D, E] float32.
    experts: their weights, in the dtype of x.
    valid: [B, T] bool, false on padding.
    activation: (gate, up) -> hidden.
    experts_per_token: experts each token is sent to.
    renormalize: see `route`.
    predictors: optional, of the experts.
    intervene: optional change of the hidden of each expert.

  Returns:
    [B, T, D], and counts over the tokens routed to each expert.
  """
  chosen, weights = route(x, router, valid, experts_per_token, renormalize)
  return IMPLEMENTATIONS[impl](x, chosen, weights, experts, predictors, activation, intervene)


def moe_dense(
  x: Array,
  chosen: Array,
  weights: Array,
  experts: Experts,
  predictors: Predictors | None,
  activation: Callable[[Array, Array], Array],
  intervene: Intervention | None,
) -> tuple[Array, HiddenCounts]:
  """Every expert on every token, weighted by the router. Arguments and results are those of `moe`."""
  one_hot = jax.nn.one_hot(chosen, experts.gate.shape[0], dtype=jnp.float32)  # [B, T, k, E]
  weights = constrain(jnp.einsum("btk,btke->bte", weights, one_hot), "BTE")
  routed = one_hot.any(axis=2)  # [B, T, E]
  gate, up = jnp.einsum("btd,edf->btef", x, experts.gate), jnp.einsum("btd,edf->btef", x, experts.up)
  predicted = None if predictors is None else predict(predictors.x, predictors.fc1, predictors.fc2)
  number = jnp.arange(experts.gate.shape[0])  # [E]
  hidden = constrain(gated_hidden(gate, up, activation, predicted, intervene, number), "BTEF")  # [B, T, E, F]
  counts = HiddenCounts(fired=count_fired(hidden, routed), routed=jnp.sum(routed, axis=(0, 1), dtype=jnp.float32))
  out = jnp.einsum("btef,efd->bted", hidden, experts.down)  # [B, T, E, D]
  return jnp.einsum("bted,bte->btd", out, weights.astype(x.dtype)), counts


def moe_grouped(
  x: Array,
  chosen: Array,
  weights: Array,
  experts: Experts,
  predictors: Predictors | None,
  activation: Callable[[Array, Array], Array],
  intervene: Intervention | None,
  *,
  gather_tokens: bool,
) -> tuple[Array, HiddenCounts]:
  """Each token's choices sorted by expert. Arguments and results are those of `moe`.

  On a mesh a device computes its rows of the batch (padded with empty ones where they do not divide) and its share of
  the neurons. With `gather_tokens` its rows are those of its group of the expert axis, and its experts its share of
  them; buffers hold the case that all choices of the group meet on one device, so none is dropped.

  Raises:
    UserError: neurons or experts do not divide over their mesh axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _local(activation, {}, x, chosen, weights, experts, predictors, intervene)
  sharding.check_divisible(mesh, {"F": experts.gate.shape[2]} | ({"E": experts.gate.shape[0]} if gather_tokens else {}))
  rows = x.shape[0]
  empty = -rows % sharding.shard_count(mesh, "B")

  def pad(array: Array, value: int = 0) -> Array:
    return jnp.pad(array, ((0, empty), *((0, 0),) * (array.ndim - 1)), constant_values=value)

  batch = sharding.RULES["B"]
  e, f = ("expert" if gather_tokens else None), "tensor"
  by_row, inner = P(batch), P(e, None, f)
  moved = {
    "tensor": ("tensor",),
    "tokens": ("expert",) if gather_tokens else (),
    "batch": tuple(axis for axis in batch if not (gather_tokens and axis == "expert")),
  }
  local = jax.shard_map(
    functools.partial(_local, activation, moved),
    in_specs=(
      by_row,
      by_row,
      by_row,
      Experts(inner, inner, P(e, f, None)),
      None if predictors is None else Predictors(P(e, None, None), inner, by_row),
      P(),
    ),
    out_specs=(by_row, HiddenCounts(P(e, f), P(e))),
    check_vma=False,  # the grouped product's loops and kernels carry no such types
  )
  if predictors is not None:
    predictors = predictors._replace(x=pad(predictors.x))
  args = pad(x), pad(chosen, experts.gate.shape[0]), pad(weights), experts, predictors, intervene
  out, counts = local(*args)
  return out[:rows], counts


def _local(
  activation: Callable[[Array, Array], Array],
  moved: dict[str, tuple[str, ...]],
  x: Array,
  chosen: Array,
  weights: Array,
  experts: Experts,
  predictors: Predictors | None,
  intervene: Intervention | None,
) -> tuple[Array, HiddenCounts]:
  """`moe_grouped` on one device.

  Args:
    activation: (gate, up) -> hidden.
    moved: the mesh axes that split the neurons ("tensor"), over which tokens are gathered ("tokens") and over which
      counts are added up ("batch"); empty without a mesh.
    x: [B, T, D], this device's rows, and so are those of `chosen`, `weights` and `predictors.x`.
    chosen: [B, T, k], of all experts.
    weights: [B, T, k].
    experts: this device's.
    predictors: of those.
    intervene: sees whole rows of the hidden.
  """
  tensor, tokens, batch = (moved.get(name, ()) for name in ("tensor", "tokens", "batch"))
  shape, dtype, k, count = x.shape, x.dtype, chosen.shape[-1], experts.gate.shape[0]

  def flat(array: Array) -> Array:  # [B, T, n] -> [B T, n], of the whole group
    array = array.reshape(-1, array.shape[-1])
    return jax.lax.all_gather(array, tokens, tiled=True) if tokens else array

  x, chosen, weights = flat(x), flat(chosen), flat(weights)
  if tokens:  # to the numbers of the experts here; those of others sort behind them
    chosen = chosen - jax.lax.axis_index(tokens) * count
    chosen = jnp.where((chosen >= 0) & (chosen < count), chosen, count)
  order = jnp.argsort(chosen.reshape(-1), stable=True)  # [S], slots by expert
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
  sizes = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(count), axis=0, dtype=jnp.int32)  # [E]

  sorted_x = _to_slots(x, order, inverse, k)  # [S, D]
  gate, up = grouped_matmul(sorted_x, experts.gate, sizes), grouped_matmul(sorted_x, experts.up, sizes)  # [S, F]
  predicted = None
  if predictors is not None:
    read = jax.nn.relu(grouped_matmul(_to_slots(flat(predictors.x), order, inverse, k), predictors.fc1, sizes))
    predicted = straight_through(grouped_matmul(read, predictors.fc2, sizes))
  hidden = gated_hidden(gate, up, activation, predicted, None)
  if intervene is not None:
    slot_expert = jnp.minimum(chosen.reshape(-1)[order], count - 1)  # [S]; rows of padding are anyone's
    slot_expert += jax.lax.axis_index(tokens) * count if tokens else 0
    hidden = _whole_rows(lambda *parts: intervene(*parts, slot_expert), tensor, gate, up, hidden)
  member = membership(sizes, order.size, jnp.bfloat16)  # [S, E]; 0 and 1 are exact
  fired = jnp.einsum("se,sf->ef", member, (hidden != 0).astype(member.dtype), preferred_element_type=jnp.float32)
  counts = HiddenCounts(fired=fired, routed=sizes.astype(jnp.float32))

  out = _permute(grouped_matmul(hidden, experts.down, sizes), inverse, order)  # [S, D], slots by token
  out = jnp.sum(out.reshape(-1, k, out.shape[-1]) * weights[..., None].astype(dtype), axis=1)  # [B T, D]
  if tensor:
    out = jax.lax.psum(out, tensor)
  if tokens:
    out = jax.lax.psum_scatter(out, tokens, tiled=True)
  if batch:
    counts = jax.lax.psum(counts, batch)
  return out.reshape(shape), counts


def _whole_rows(intervene: Callable[..., Array], tensor: tuple[str, ...], *parts: Array) -> Array:
  """intervene(gate, up, hidden) [S, F] where F may be split over mesh axes: a top-k needs all of a row."""
  if not tensor:
    return intervene(*parts)
  whole = intervene(*(jax.lax.all_gather(part, tensor, axis=1, tiled=True) for part in parts))
  width = parts[0].shape[1]
  return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(tensor) * width, width, axis=1)


@jax.custom_vjp
def _permute(x: Array, order: Array, inverse: Array) -> Array:
  """x[order]. Its gradient is a gather by the inverse permutation: the scatter JAX would make is serial on CPU."""
  del inverse
  return x[order]


_permute.defvjp(
  lambda x, order, inverse: (x[order], inverse),
  lambda inverse, dout: (dout[inverse], None, None),
)


def _to_slots(x: Array, order: Array, inverse: Array, k: int) -> Array:
  """x [n, D] -> [n k, D]: each row once for each of its choices, in the order of the slots."""

  @jax.custom_vjp
  def gathered(x: Array, order: Array, inverse: Array) -> Array:
    del inverse
    return x[order // k]

  gathered.defvjp(
    lambda x, order, inverse: (x[order // k], inverse),
    lambda inverse, dout: (dout[inverse].reshape(-1, k, dout.shape[-1]).sum(1), None, None),
  )
  return gathered(x, order, inverse)


IMPLEMENTATIONS = {
  "dense": moe_dense,
  "ragged": functools.partial(moe_grouped, gather_tokens=False),
  "ep_allgather": functools.partial(moe_grouped, gather_tokens=True),
}
