"""The decoder: Linen modules that own the parameters and call the pure functions of this package.

Parameters are float32 and stacked over layers (leading axis L) by `nn.scan`:

    embed [V, D] · final_norm [D] · head [D, V] (absent when tied)
    layers/attention_norm [L, D] · layers/ffn_norm [L, D]
    layers/attention_post_norm [L, D] · layers/ffn_post_norm [L, D]                              with post_norms
    layers/attention/{query [L, D, N, H], key [L, D, K, H], value [L, D, K, H], out [L, N, H, D]}
    layers/attention/{query_bias [L, N, H], key_bias [L, K, H], value_bias [L, K, H]}            with attention_bias
    layers/attention/{query_norm [L, N, H], key_norm [L, K, H]}                                  with qk_norm
    layers/ffn/{gate [L, D, F], up [L, D, F], down [L, F, D]}
    layers/ffn/{router [L, D, E], gate [L, E, D, F], up [L, E, D, F], down [L, E, F, D]}     with experts
    layers/ffn/threshold [L]                                                                     with hidden_thresholds
    layers/ffn/shared/{gate, up, down} as dense, layers/ffn/shared_gate [L, D]                   with a shared expert
    layers/ffn/predictor/{fc1 [L, D, R], fc2 [L, R, F]}, with E as above                         with predictors
    layers/ffn/predictor/threshold [L], with experts [L, E]                          with predictors and thresholds
    first/...                                                 as layers, for the dense layers before those with experts
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from tsparse.activations import KEPT_MASK, activation
from tsparse.errors import UserError
from tsparse.models import layers, rope
from tsparse.models.attention import attention
from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.models.counts import HiddenCounts, ModelCounts
from tsparse.models.ffn import Intervention, feed_forward, ffn_input
from tsparse.models.loss import head_cross_entropy
from tsparse.models.moe import Experts, Predictors, moe
from tsparse.models.predictor import predict
from tsparse.models.router import Jitter, RouterSums, router_logits, router_sums
from tsparse.models.threshold import Thresholded
from tsparse.sharding import constrain

Array = jax.Array

# What the backward pass keeps of a layer: everything, the outputs of the weight matrices and of attention, or only the
# layer's input. Grouped products and attention are loops and kernels, which only names tell apart.
REMAT = {
  "none": None,  # no jax.checkpoint at all, which would round, and so copy, what it keeps
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    jax.checkpoint_policies.save_only_these_names("mixed", "expert_gate", "expert_up", KEPT_MASK),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}


def _weight(
  module: nn.Module, name: str, axes: str, fan_in: str, scale: float = 1.0, dtype: jnp.dtype | None = None
) -> Array:
  """Matrix `name`, one dimension per axis letter: normal with variance scale^2 / (product of the fan_in axes).

  The letters are also its logical sharding axes. Stored in float32, returned in the compute dtype.
  """
  sizes = module.config.sizes
  inputs = math.prod(sizes[letter] for letter in fan_in)
  init = nn.with_logical_partitioning(nn.initializers.normal(scale * inputs**-0.5), tuple(axes))
  weight = module.param(name, init, tuple(sizes[letter] for letter in axes), jnp.float32)
  return weight.astype(dtype or module.config.dtype)


def _vector(module: nn.Module, name: str, axes: str, init: nn.initializers.Initializer) -> Array:
  """Scale or bias `name`, float32, one dimension per axis letter."""
  shape = tuple(module.config.sizes[letter] for letter in axes)
  return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), shape, jnp.float32)


def _norm(module: nn.Module, name: str, x: Array, axes: str = "D") -> Array:
  """RMSNorm of x [B, T, axes] over all its `axes` together, by the scale `name`."""
  config = module.config
  scale = _vector(module, name, axes, nn.initializers.constant(1 - config.norm_offset))
  flat = x.reshape(*x.shape[:2], -1)
  return layers.rms_norm(flat, scale.reshape(-1), config.norm_eps, config.norm_offset).reshape(x.shape)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array, cos: Array, sin: Array, segment_ids: Array, window_index: Array | None) -> Array:
    """x [B, T, D], rotary angles [B, T, 1, H/2], segment_ids [B, T] -> [B, T, D].

    `window_index` says which of the model's windows, in order, is the layer's; None where there is one for all.
    """
    config = self.config
    query = layers.project("btd,dnh->btnh", x, _weight(self, "query", "DNH", fan_in="D"))
    key = layers.project("btd,dkh->btkh", x, _weight(self, "key", "DKH", fan_in="D"))
    value = layers.project("btd,dkh->btkh", x, _weight(self, "value", "DKH", fan_in="D"))
    if config.attention_bias:
      query += _vector(self, "query_bias", "NH", nn.initializers.zeros).astype(x.dtype)
      key += _vector(self, "key_bias", "KH", nn.initializers.zeros).astype(x.dtype)
      value += _vector(self, "value_bias", "KH", nn.initializers.zeros).astype(x.dtype)
    if config.qk_norm:
      query, key = _norm(self, "query_norm", query, "NH"), _norm(self, "key_norm", key, "KH")
    query = constrain(rope.rotate(query, cos, sin), "BTNH")
    key = constrain(rope.rotate(key, cos, sin), "BTKH")
    by_window = [
      functools.partial(
        attention, window=window, scalar=config.query_scalar, cap=config.attention_softcap, impl=config.attention_impl
      )
      for window in sorted(set(config.windows))
    ]
    args = query, key, value, segment_ids
    mixed = by_window[0](*args) if window_index is None else jax.lax.switch(window_index, by_window, *args)
    out = _weight(self, "out", "NHD", fan_in="NH", scale=(2 * config.num_layers) ** -0.5)
    return layers.project("btnh,nhd->btd", checkpoint_name(mixed, "mixed"), out)


class Predictor(nn.Module):
  """A neuron predictor, or one for each expert."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> tuple[Array, Array, Array | None]:
    """Its weights, fc1 [D, R] and fc2 [R, F], with experts [E, D, R] and [E, R, F], and its threshold [] or [E]."""
    experts = "E" if self.config.num_experts else ""
    fc1, fc2 = _weight(self, "fc1", experts + "DR", fan_in="D"), _weight(self, "fc2", experts + "RF", fan_in="R")
    thresholds = self.config.predictor_thresholds
    return fc1, fc2, _vector(self, "threshold", experts, nn.initializers.zeros) if thresholds else None


class FeedForward(nn.Module):
  """The gated FFN, dense or with experts, of which one may be shared by all tokens."""

  config: ModelConfig
  by_token: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    residual: Array,
    valid: Array,
    interventions: Mapping[str, Intervention],
    jitter: Jitter | None,
  ) -> tuple[Array, dict[str, HiddenCounts]]:
    """x, residual (x before its norm) [B, T, D], valid [B, T] -> [B, T, D] and counts by kind of FFN, [E, F] each.

    `interventions` are by kind of FFN too; a kind without one is left alone. The RouterSums are set aside in the
    collection "router", for those who ask for it.
    """
    config, intervene = self.config, interventions.get("ffn")
    experts = "E" if config.num_experts else ""
    gate = _weight(self, "gate", experts + "DF", fan_in="D")
    up = _weight(self, "up", experts + "DF", fan_in="D")
    down = _weight(self, "down", experts + "FD", fan_in="F", scale=(2 * config.num_layers) ** -0.5)
    act = activation(config.activation)
    if config.hidden_thresholds:
      intervene = Thresholded(_vector(self, "threshold", "", nn.initializers.zeros), intervene)
    predictor = None
    if config.predictor_ranks:
      read = residual if config.predictor_input == "before_norm" else x
      fc1, fc2, threshold = Predictor(config, name="predictor")()
      predictor = Predictors(fc1, fc2, read, threshold)
    if not config.num_experts:
      predicted = predictor and predict(predictor.x, predictor.fc1, predictor.fc2, predictor.threshold)
      fed = ffn_input(x, intervene)
      out, counts = feed_forward(fed, gate, up, down, valid, act, predicted, intervene, self.by_token)
      return out, {"ffn": counts}
    router = _weight(self, "router", "DE", fan_in="D", dtype=jnp.float32)
    logits = router_logits(x, router, jitter)  # [B, T, E]
    if self.is_mutable_collection("router"):
      self.sow("router", "sums", router_sums(logits, valid), init_fn=lambda: None, reduce_fn=lambda _, sums: sums)
    chosen, renormalize, weights = config.experts_per_token, config.router_renormalize, Experts(gate, up, down)
    by_router = logits, weights, valid, act, chosen, renormalize, predictor, intervene, self.by_token
    out, counts = moe(config.moe_impl, ffn_input(x, intervene), *by_router)
    if not config.num_shared_experts:
      return out, {"ffn": counts}
    of_shared = {"ffn": interventions["shared"]} if "shared" in interventions else {}
    shared_ffn = FeedForward(config.shared, self.by_token, name="shared")
    shared, shared_counts = shared_ffn(x, residual, valid, of_shared, None)
    if config.shared_gate:
      shared *= jax.nn.sigmoid(jnp.einsum("btd,d->bt", x, _weight(self, "shared_gate", "D", fan_in="D")))[..., None]
    return out + shared, {"ffn": counts, "shared": shared_counts["ffn"]}


class FFNPass(NamedTuple):
  """What the FFN of a layer read, as FeedForward's arguments call it, and what it gave, [B, T, D] each."""

  x: Array
  residual: Array
  out: Array


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + ffn(norm(x)), each normed again before it is added if post_norms."""

  config: ModelConfig
  by_token: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    cos: Array,
    sin: Array,
    segment_ids: Array,
    window_index: Array | None,
    interventions: Mapping[str, Intervention],
    jitter: Jitter | None,
  ) -> tuple[Array, dict[str, HiddenCounts]]:
    """x [B, T, D] -> x [B, T, D] and the layer's counts (carry and output of the scan over layers).

    The FFNPass is set aside in the collection "passes", for those who ask for it.
    """
    config = self.config
    x = constrain(x, "BTD")
    normed = _norm(self, "attention_norm", x)
    out = Attention(config, name="attention")(normed, cos, sin, segment_ids, window_index)
    x = x + (_norm(self, "attention_post_norm", out) if config.post_norms else out)
    normed = _norm(self, "ffn_norm", x)
    out, counts = FeedForward(config, self.by_token, name="ffn")(normed, x, segment_ids > 0, interventions, jitter)
    if self.is_mutable_collection("passes"):
      seen = FFNPass(normed, x, out)
      self.sow("passes", "of_ffn", seen, init_fn=lambda: None, reduce_fn=lambda _, seen: seen)
    if config.post_norms:
      out = _norm(self, "ffn_post_norm", out)
    return constrain(x + out, "BTD"), counts


def _stack(config: ModelConfig, length: int, by_token: bool, unroll: bool, name: str) -> nn.Module:
  """`length` equal layers in a scan: parameters with a leading axis L, and so are the other arguments of a layer, the
  counts and the sums of the routers."""
  policy = remat_policy(config.remat)
  scanned = nn.scan(
    nn.remat(Block, policy=policy, prevent_cse=False) if policy else Block,
    variable_axes={"params": 0, "router": 0, "passes": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0, 0),
    length=length,
    unroll=length if unroll else 1,
    metadata_params={nn.PARTITION_NAME: "L"},
  )
  return scanned(config, by_token, name=name)


class Transformer(nn.Module):
  """A decoder-only language model over packed rows.

  Attributes:
    config: the model.
    by_token: fill in the `by_token` of the counts.
    unroll: the scans over layers take one turn with all of them, the same numbers. It takes longer to compile and is
      faster on CPU, where XLA otherwise copies what the turns share: weights, kept activations, gradients.
  """

  config: ModelConfig
  by_token: bool = False
  unroll: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    intervention: Any = None,
    jitter: Jitter | None = None,
    logits: bool = True,
  ) -> tuple[Array, ModelCounts]:
    """Next-token logits.

    Args:
      tokens: [B, T] int32.
      segment_ids: [B, T] int32; documents packed into a row have different ids, 0 is padding.
      positions: [B, T] int32, position in the segment.
      intervention: optional, by kind of FFN (as the counts are), each a pytree that is itself a callable (gate, up,
        hidden, expert) -> hidden, see ffn.Intervention, every leaf with a leading axis L of the layers of its kind:
        layer l applies the slice l. A kind without one is left alone. Leaves are traced: sweeping their values does not
        recompile.
      jitter: optional noise of the routers, for training; its leaves have a leading axis L of all layers.
      logits: if false, what the head would read is returned instead (`token_losses` needs no more).

    Returns:
      logits [B, T, V] float32 (or the final hidden [B, T, D] in the compute dtype), and by kind of FFN the HiddenCounts
      with fired [L, E, F] and routed [L, E]. With mutable=["router"] also their RouterSums.
    """
    config = self.config
    embed = _weight(self, "embed", "VD", fan_in="D")
    x = constrain(embed[tokens], "BTD")
    if config.scale_embeddings:
      x *= jnp.asarray(config.d_model**0.5, x.dtype)
    angles_of = functools.partial(
      rope.rotary_angles, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling
    )
    # a barrier, or XLA computes them wherever they are used; on CPU only a loop, here over rows, keeps it from that
    cos, sin = jax.lax.map(angles_of, positions) if self.unroll else jax.lax.optimization_barrier(angles_of(positions))
    windows = sorted(set(config.windows))
    window_index = jnp.array([windows.index(window) for window in config.windows]) if len(windows) > 1 else None  # [L]
    first, counts = config.dense_layers, {}
    of_first, of_rest = split_interventions(config, intervention or {})
    per_layer = window_index, jitter
    if first:
      index, noise = jax.tree.map(lambda leaf: leaf[:first], per_layer)
      dense_layers = _stack(config.first, first, self.by_token, self.unroll, "first")
      x, dense = dense_layers(x, cos, sin, segment_ids, index, of_first, noise)
      counts["first"] = dense["ffn"]
    index, noise = jax.tree.map(lambda leaf: leaf[first:], per_layer)
    rest = _stack(config, config.num_layers - first, self.by_token, self.unroll, "layers")
    x, others = rest(x, cos, sin, segment_ids, index, of_rest, noise)
    counts |= others
    x = _norm(self, "final_norm", x)
    if not logits:
      return x, counts
    if config.tie_embeddings:
      out = jnp.einsum("btd,vd->btv", x, embed, preferred_element_type=jnp.float32)
    else:
      head = _weight(self, "head", "DV", fan_in="D")
      out = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32)
    return constrain(layers.softcap(out, config.final_softcap), "BTV"), counts


def split_interventions(config: ModelConfig, by_kind: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The interventions as the dense first layers and as the others name them; ValueError for a kind there is not."""
  unknown = set(by_kind) - set(ffn_layers(config))
  if unknown:
    raise ValueError(f"interventions on {sorted(unknown)}: this model has the FFNs {list(ffn_layers(config))}")
  of_first = {"ffn": by_kind["first"]} if "first" in by_kind else {}
  return of_first, {kind: by_kind[kind] for kind in by_kind if kind != "first"}


def final_hidden(
  model: Transformer,
  params: Any,
  batch: Mapping[str, Array],
  intervention: Any = None,
  jitter: Jitter | None = None,
  with_router: bool = False,
) -> tuple[Array, ModelCounts, RouterSums | None]:
  """What the head reads of a batch.

  Args:
    model: the decoder.
    params: its parameters.
    batch: inputs, segment_ids, positions, [B, T] int32 each; others are not read.
    intervention: see `Transformer`.
    jitter: see `Transformer`.
    with_router: the model has experts, and the sums of their routers are wanted.

  Returns:
    [B, T, D] in the compute dtype, the counts of the hidden, and RouterSums with a leading axis L.
  """
  inputs = batch["inputs"], batch["segment_ids"], batch["positions"]
  mutable = ["router"] if with_router else []
  (hidden, counts), aside = model.apply(
    {"params": params}, *inputs, intervention, jitter, logits=False, mutable=mutable
  )
  return hidden, counts, aside["router"]["layers"]["ffn"]["sums"] if with_router else None


def ffn_passes(model: Transformer, params: Any, batch: Mapping[str, Array]) -> tuple[Array, dict[str, FFNPass]]:
  """`final_hidden` of a batch, and by stack of layers ("first", "layers") the FFNPass with a leading axis L."""
  inputs = batch["inputs"], batch["segment_ids"], batch["positions"]
  (hidden, _), aside = model.apply({"params": params}, *inputs, logits=False, mutable=["passes"])
  return hidden, {stack: of["of_ffn"] for stack, of in aside["passes"].items()}


def head_of(model: Transformer, params: Any) -> Array:
  """The output head, [D, V] float32."""
  return params["embed"].T if model.config.tie_embeddings else params["head"]


def token_losses(
  model: Transformer, params: Any, batch: Mapping[str, Array], intervention: Any = None
) -> tuple[Array, Array, ModelCounts]:
  """Cross-entropy of each of a batch's targets, without ever holding the logits [B, T, V].

  Training needs but their sum, whose gradient takes less: loss.summed_cross_entropy.

  Args:
    model: the decoder.
    params: its parameters.
    batch: inputs, targets, segment_ids, positions, each [B, T] int32.
    intervention: see `Transformer`.

  Returns:
    -log p(target) and log Z, [B, T] float32 each, and the counts of the hidden.
  """
  hidden, counts, _ = final_hidden(model, params, batch, intervention)
  nll, log_z = head_cross_entropy(hidden, head_of(model, params), batch["targets"], model.config.final_softcap)
  return nll, log_z, counts


def remat_policy(name: str):
  """The checkpoint policy called `name`, None for no checkpoint; UserError names the known ones."""
  if name not in REMAT:
    raise UserError(f"config.model.remat {name!r} is unknown: choose one of {', '.join(REMAT)}.")
  return REMAT[name]


def abstract_parameters(model: Transformer) -> tuple[Any, Any]:
  """Shapes and logical axes of the parameters, nothing allocated: trees of ShapeDtypeStruct and PartitionSpec."""
  row = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  boxed = jax.eval_shape(model.init, jax.random.key(0), row, row, row)["params"]
  shapes = jax.tree.map(
    lambda box: box.unbox(apply_constraint=False), boxed, is_leaf=lambda box: isinstance(box, nn.meta.AxisMetadata)
  )
  return shapes, nn.get_partition_spec(boxed)


def init_parameters(model: Transformer, key: Array) -> Any:
  """Random parameters, a plain pytree of float32 arrays; under jit with `out_shardings` they are born sharded."""
  if len(set(model.config.predictor_ranks)) > 1:
    raise UserError("config.model.predictor_ranks differ between layers: such predictors come from a checkpoint only.")
  row = jnp.zeros((1, 2), jnp.int32)
  return nn.unbox(model.init(key, row, row, row)["params"])
