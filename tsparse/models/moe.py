"""Mixture of experts after Mixtral (arXiv 2401.04088), the implementations one table over one tree of parameters.

    dense          every expert on every token: E / experts_per_token times the work, and obviously right; the oracle
    ragged         each token's choices sorted by expert, two grouped products and no dropped token; a device computes
                   its own tokens and gathers the experts' weights, over the mesh's expert axis too
    ep_allgather   the same, and experts stay where they are: tokens are gathered over the expert axis, each device
                   computes the choices of its experts, and the outputs are added up where their tokens live
    ep_ragged_a2a  the same, and each choice of a token travels to the device of its expert and back; TPU only

The last three are one flow, `_grouped`, each with its own way from tokens to experts (models/dispatch.py). Padding is
routed nowhere and its output is 0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tsparse import sharding
from tsparse.models.counts import HiddenCounts, count_fired, count_fired_by_token, sum_penalty
from tsparse.models.dispatch import GROUP, Dispatch, at_home, gathered, sent
from tsparse.models.ffn import Intervention, gated_hidden, penalty_of
from tsparse.models.grouped import grouped_matmul, grouped_matmuls, membership
from tsparse.models.predictor import predict, straight_through
from tsparse.models.router import route
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
  threshold: Array | None = None  # [E] float32; None is 0


def moe(
  impl: str,
  x: Array,
  logits: Array,
  experts: Experts,
  valid: Array,
  activation: Callable[[Array, Array], Array],
  experts_per_token: int,
  renormalize: bool = True,
  predictors: Predictors | None = None,
  intervene: Intervention | None = None,
  by_token: bool = False,
) -> tuple[Array, HiddenCounts]:
  """sum over the chosen experts e of weight_e down_e(act(x gate_e, x up_e)): the same numbers by any implementation.

  Args:
    impl: a key of IMPLEMENTATIONS.
    x: [B, T, D].
    logits: [B, T, E] float32, the router's.
    experts: their weights, in the dtype of x.
    valid: [B, T] bool, false on padding.
    activation: (gate, up) -> hidden.
    experts_per_token: experts each token is sent to.
    renormalize: see `route`.
    predictors: optional, of the experts.
    intervene: optional change of the hidden of each expert.
    by_token: fill in the `by_token` of the counts.

  Returns:
    [B, T, D], and counts over the tokens routed to each expert.
  """
  chosen, weights = route(logits, valid, experts_per_token, renormalize)
  return IMPLEMENTATIONS[impl](x, chosen, weights, experts, predictors, activation, intervene, by_token)


def moe_dense(
  x: Array,
  chosen: Array,
  weights: Array,
  experts: Experts,
  predictors: Predictors | None,
  activation: Callable[[Array, Array], Array],
  intervene: Intervention | None,
  by_token: bool = False,
) -> tuple[Array, HiddenCounts]:
  """Every expert on every token, weighted by the router. Arguments and results are those of `moe`."""
  one_hot = jax.nn.one_hot(chosen, experts.gate.shape[0], dtype=jnp.float32)  # [B, T, k, E]
  weights = constrain(jnp.einsum("btk,btke->bte", weights, one_hot, precision="highest"), "BTE")
  routed = one_hot.any(axis=2)  # [B, T, E]
  gate, up = jnp.einsum("btd,edf->btef", x, experts.gate), jnp.einsum("btd,edf->btef", x, experts.up)
  predicted = None
  if predictors is not None:
    predicted = predict(predictors.x, predictors.fc1, predictors.fc2, predictors.threshold)
  number = jnp.arange(experts.gate.shape[0])  # [E]
  hidden = constrain(gated_hidden(gate, up, activation, predicted, intervene, number), "BTEF")  # [B, T, E, F]
  counts = HiddenCounts(
    fired=count_fired(hidden, routed),
    routed=jnp.sum(routed, axis=(0, 1), dtype=jnp.float32),
    by_token=count_fired_by_token(hidden, routed) if by_token else None,
    penalty=sum_penalty(penalty, hidden, routed) if (penalty := penalty_of(intervene)) else None,
  )
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
  by_token: bool = False,
  *,
  dispatch: Dispatch,
) -> tuple[Array, HiddenCounts]:
  """Each token's choices sorted by expert. Arguments and results are those of `moe`.

  On a mesh a device computes its rows of the batch (padded with empty ones where they do not divide) and its share of
  the neurons. Unless `dispatch` is `at_home` it holds its share of the experts too, and slots of its group along the
  expert axis come to it; buffers hold the case that all meet on one device, so none is dropped.

  Raises:
    UserError: neurons or experts do not divide over their mesh axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:  # XLA does not leave out the sums over one device: a copy of each gradient
    return _grouped(activation, at_home, (), (), by_token, x, chosen, weights, experts, predictors, intervene)
  if mesh.shape["expert"] == 1:
    dispatch = at_home
  e, f, batch = (None if dispatch is at_home else "expert"), "tensor", sharding.RULES["B"]
  sharding.check_divisible(mesh, {"F": experts.gate.shape[2]} | ({"E": experts.gate.shape[0]} if e else {}))
  rows = x.shape[0]
  empty = -rows % sharding.shard_count(mesh, "B")

  def pad(array: Array, value: int = 0) -> Array:
    return jnp.pad(array, ((0, empty), *((0, 0),) * (array.ndim - 1)), constant_values=value)

  by_row, inner = P(batch), P(e, None, f)
  grouped = jax.shard_map(
    functools.partial(_grouped, activation, dispatch, (f,), tuple(axis for axis in batch if axis != e), by_token),
    in_specs=(
      by_row,
      by_row,
      by_row,
      Experts(inner, inner, P(e, f, None)),
      predictors and Predictors(P(e, None, None), inner, by_row, None if predictors.threshold is None else P(e)),
      P(),
    ),
    out_specs=(
      by_row,
      HiddenCounts(P(e, f), P(e), by_row if by_token else None, P(e) if penalty_of(intervene) else None),
    ),
    check_vma=False,  # the grouped product's loops and kernels carry no such types
  )
  if predictors is not None:
    predictors = predictors._replace(x=pad(predictors.x))
  args = pad(x), pad(chosen, experts.gate.shape[0]), pad(weights), experts, predictors, intervene
  out, counts = grouped(*args)
  return out[:rows], counts.replace(by_token=counts.by_token[:rows]) if by_token else counts


def _grouped(
  activation: Callable[[Array, Array], Array],
  dispatch: Dispatch,
  neurons: tuple[str, ...],
  batch: tuple[str, ...],
  by_token: bool,
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
    dispatch: how tokens reach their experts.
    neurons: the mesh axes that split the neurons; none without a mesh.
    batch: the mesh axes that split the tokens which the experts here see; none without a mesh.
    by_token: fill in the `by_token` of the counts.
    x: [B, T, D], this device's rows, and so are those of `chosen`, `weights` and `predictors.x`.
    chosen: [B, T, k], of all experts.
    weights: [B, T, k].
    experts: this device's.
    predictors: of those.
    intervene: sees whole rows of the hidden.
  """

  def flat(array: Array) -> Array:  # [B, T, n] -> [B T, n]
    return array.reshape(-1, array.shape[-1])

  sizes, fetch, deliver = dispatch(flat(chosen), flat(weights), experts.gate.shape[0])
  slots = fetch(flat(x))  # [S, D]
  gate, up = grouped_matmuls(slots, (experts.gate, experts.up), sizes)  # [S, F]
  gate, up = checkpoint_name(gate, "expert_gate"), checkpoint_name(up, "expert_up")
  predicted = None
  if predictors is not None:
    read = jax.nn.relu(grouped_matmul(fetch(flat(predictors.x)), predictors.fc1, sizes))
    threshold = predictors.threshold
    if threshold is not None:
      threshold = jnp.repeat(threshold, sizes, total_repeat_length=slots.shape[0])  # [S]
    predicted = straight_through(grouped_matmul(read, predictors.fc2, sizes), threshold)
  hidden = gated_hidden(gate, up, activation, predicted, None)
  if intervene is not None:
    here = experts.gate.shape[0]
    first = 0 if dispatch is at_home else jax.lax.axis_index(GROUP) * here
    expert = first + jnp.repeat(jnp.arange(here), sizes, total_repeat_length=slots.shape[0])  # [S]; of none: the last
    split = () if getattr(intervene, "elementwise", False) else neurons
    hidden = _whole_rows(lambda *parts: intervene(*parts, expert), split, gate, up, hidden)
  member = membership(sizes, hidden.shape[0], hidden.dtype)  # [S, E]; 0 and 1 are exact
  fired = jnp.einsum("se,sf->ef", member, (hidden != 0).astype(member.dtype), preferred_element_type=jnp.float32)
  counts = HiddenCounts(fired=fired, routed=sizes.astype(jnp.float32))
  penalty = penalty_of(intervene)
  if penalty is not None:
    slot = penalty(hidden).astype(jnp.float32).sum(-1)  # [S]
    found = jnp.einsum("se,s->e", member.astype(jnp.float32), slot, precision="highest")
    counts = counts.replace(penalty=jax.lax.psum(found, neurons) if neurons else found)

  out = deliver(grouped_matmul(hidden, experts.down, sizes)).reshape(x.shape)
  out = jax.lax.psum(out, neurons) if neurons else out
  counts = jax.lax.psum(counts, batch) if batch else counts
  if by_token:  # the slots' counts become the tokens' as their outputs do, but none is weighted
    slot = jnp.sum(hidden != 0, axis=-1, keepdims=True, dtype=jnp.float32) * member.sum(-1, keepdims=True)  # [S, 1]
    unweighted = dispatch(flat(chosen), jnp.ones_like(flat(weights)), experts.gate.shape[0])
    fired = unweighted.deliver(slot).reshape(x.shape[:2])
    counts = counts.replace(by_token=jax.lax.psum(fired, neurons) if neurons else fired)
  return out, counts


def _whole_rows(intervene: Callable[..., Array], neurons: tuple[str, ...], *parts: Array) -> Array:
  """intervene(gate, up, hidden) [S, F] where F may be split over mesh axes: a top-k needs all of a row."""
  if not neurons:
    return intervene(*parts)
  whole = intervene(*(jax.lax.all_gather(part, neurons, axis=1, tiled=True) for part in parts))
  width = parts[0].shape[1]
  return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(neurons) * width, width, axis=1)


IMPLEMENTATIONS = {
  "dense": moe_dense,
  "ragged": functools.partial(moe_grouped, dispatch=at_home),
  "ep_allgather": functools.partial(moe_grouped, dispatch=gathered),
  "ep_ragged_a2a": functools.partial(moe_grouped, dispatch=sent),
}
# Implementations that XLA compiles for one platform only: name -> that platform.
ONLY_ON = {"ep_ragged_a2a": "tpu"}
