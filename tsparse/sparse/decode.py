"""The forward pass of decoding: pure functions of parameters (layout.py), a cache of keys and values, and tokens.

One function serves the prompt (T tokens a row) and each token after it (T = 1); its oracle is the Transformer. The slot
of a token in the cache is its position, so a row sees exactly what its own prompt and tokens wrote: what padding at the
end of a shorter prompt wrote lies at later positions, and is overwritten before it is seen.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from tsparse.activations import activation
from tsparse.models import layers, rope, router
from tsparse.models.config import ModelConfig
from tsparse.models.ffn import Intervention
from tsparse.models.threshold import Thresholded
from tsparse.models.transformer import split_interventions
from tsparse.sparse.kernels import reference, table
from tsparse.sparse.kernels.reference import Neurons, Predictor
from tsparse.sparse.kernels.table import KERNELS

Array = jax.Array
Cache = list[tuple[Array, Array]]  # of each layer, keys and values [B, K, S, H]


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
  """A cache for `batch` rows of up to `length` tokens, in the dtype of compute."""
  shape = batch, config.num_kv_heads, length, config.head_dim
  return [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.num_layers)]


def hidden_states(
  config: ModelConfig,
  kernels: str,
  modes: Sequence[str],
  params: Any,
  cache: Cache,
  tokens: Array,
  positions: Array,
  valid: Array,
  interventions: Sequence[Any] = (),
) -> tuple[Array, Cache, Array]:
  """What the head reads, the cache with the tokens' keys and values, and how much of each layer's hidden was not zero.

  On a mesh (`jax.set_mesh`) the kernels run as table.py says, and so does layout.py place the parameters.

  Args:
    config: the model; static, as the next two.
    kernels: a key of table.KERNELS.
    modes: which rows of each layer's FFN are read, of reference.MODES.
    params: in the layout of layout.py.
    cache: as `empty_cache` made it or this function returned it.
    tokens: [B, T] int32.
    positions: [B, T] int32, consecutive in each row, below the length of the cache.
    valid: [B, T] bool, false on padding, which comes last in its row and whose result has no meaning.
    interventions: of each layer, as `by_layer` makes them; none leaves the hidden alone. They are computed by the
      kernels of reference.py, and so are thresholds of the hidden and activations that compare the entries of a row.

  Returns:
    [B, T, D] in the dtype of compute, the cache, and [L] float32: entries of the FFN hidden that are not zero, over the
    valid tokens; `hidden_entries` says of how many.
  """
  x = params["embed"][tokens].astype(config.dtype)
  if config.scale_embeddings:
    x *= jnp.asarray(config.d_model**0.5, x.dtype)
  cos, sin = rope.rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
  after, fired = [], []
  each = interventions or [{}] * config.num_layers
  for window, layer, kept, mode, masks in zip(config.windows, params["layers"], cache, modes, each, strict=True):
    normed = _norm(config, layer["attention_norm"], x)
    out, kept = _attention(config, KERNELS[kernels], layer, normed, cos, sin, kept, positions, window)
    x += _norm(config, layer["attention_post_norm"], out) if config.post_norms else out
    normed = _norm(config, layer["ffn_norm"], x)
    out, count = _feed_forward(config, KERNELS[kernels], mode, layer, normed, x, valid, masks)
    x += _norm(config, layer["ffn_post_norm"], out) if config.post_norms else out
    after.append(kept)
    fired.append(count)
  return _norm(config, params["final_norm"], x), after, jnp.stack(fired)


def hidden_entries(config: ModelConfig) -> list[int]:
  """Entries of the FFN hidden of one token in each layer: over the experts it is routed to, and the shared ones."""
  routed = max(1, config.experts_per_token) * config.d_ff + config.num_shared_experts * config.shared_d_ff
  return [config.dense_d_ff] * config.dense_layers + [routed] * (config.num_layers - config.dense_layers)


def by_layer(config: ModelConfig, intervention: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """What the Transformer takes, by kind of FFN with a leading axis L, as a dict for each layer: "ffn" and "shared"."""
  of_first, of_rest = split_interventions(config, intervention or {})
  first = config.dense_layers
  return [
    jax.tree.map(lambda leaf, i=i: leaf[i], of_first)
    if i < first
    else jax.tree.map(lambda leaf, i=i: leaf[i - first], of_rest)
    for i in range(config.num_layers)
  ]


def logits_of(config: ModelConfig, kernels: str, params: Any, hidden: Array) -> Array:
  """Next-token logits [..., V] float32 of hidden states [..., D]."""
  head = params["embed" if config.tie_embeddings else "head"]
  out = table.linear(KERNELS[kernels], hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32), head)
  return layers.softcap(out, config.final_softcap).reshape(*hidden.shape[:-1], -1)


def _norm(config: ModelConfig, scale: Array, x: Array) -> Array:
  return layers.rms_norm(x, scale, config.norm_eps, config.norm_offset)


def _linear(kernels: ModuleType, x: Array, w: Array) -> Array:
  """x [B, T, in], w [out, in] -> [B, T, out], in the dtype of x."""
  out = table.linear(kernels, x.reshape(-1, x.shape[-1]).astype(jnp.float32), w)
  return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _attention(
  config: ModelConfig,
  kernels: ModuleType,
  layer: dict[str, Array],
  x: Array,
  cos: Array,
  sin: Array,
  kept: tuple[Array, Array],
  positions: Array,
  window: int,
) -> tuple[Array, tuple[Array, Array]]:
  batch, time = positions.shape
  heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
  qkv = _linear(kernels, x, layer["qkv"])
  if config.attention_bias:
    qkv += layer["qkv_bias"].astype(x.dtype)
  query, key, value = jnp.split(qkv, [heads * size, (heads + kv_heads) * size], axis=-1)
  if config.qk_norm:
    query, key = _norm(config, layer["query_norm"], query), _norm(config, layer["key_norm"], key)
  query = rope.rotate(query.reshape(batch, time, heads, size), cos, sin)
  key = rope.rotate(key.reshape(batch, time, kv_heads, size), cos, sin)
  value = value.reshape(batch, time, kv_heads, size)
  keys, values = (_write(old, new, positions[:, 0]) for old, new in zip(kept, (key, value), strict=True))
  mixed = table.attend(
    kernels,
    *(array.astype(jnp.float32) for array in (query, keys, values)),
    positions,
    window,
    (config.query_scalar or size) ** -0.5,
    config.attention_softcap,
  )
  return _linear(kernels, mixed.reshape(batch, time, -1).astype(x.dtype), layer["out"]), (keys, values)


def _write(old: Array, new: Array, start: Array) -> Array:
  """The cache `old` [B, K, S, H] with `new` [B, T, K, H] in the slots from start [B] on."""

  def row(old: Array, new: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

  return jax.vmap(row)(old, new.swapaxes(1, 2), start)


def _feed_forward(
  config: ModelConfig,
  kernels: ModuleType,
  mode: str,
  layer: dict[str, Any],
  x: Array,
  residual: Array,
  valid: Array,
  masks: Mapping[str, Intervention],
) -> tuple[Array, Array]:
  """x, residual (x before its norm) [B, T, D], valid [B, T] -> [B, T, D], and [] the entries that are not zero."""
  act, dim = activation(config.activation), x.shape[-1]
  flat = x.reshape(-1, dim).astype(jnp.float32)  # [B T, D]

  def ffn(
    chosen: Array, weights: Array, neurons: Neurons, predictor: Predictor | None, mask: Intervention | None
  ) -> tuple[Array, Array]:
    args = (part.reshape(-1, part.shape[-1]) for part in (chosen, weights))
    if mask is None and not act.whole_rows:
      out, fired = table.feed_forward(kernels, mode, act, flat, *args, neurons, predictor)
    else:
      out, fired = reference.feed_forward(mode, act, flat, *args, neurons, predictor, mask)
    return out.reshape(x.shape).astype(x.dtype), fired.sum()

  alone = jnp.where(valid, 0, 1)[..., None], valid[..., None].astype(jnp.float32)
  if "router" in layer:
    logits = router.router_logits(x, layer["router"])
    routed = router.route(logits, valid, config.experts_per_token, config.router_renormalize)
  else:
    routed = alone
  predictor = None
  if "fc1" in layer:
    read = residual if config.predictor_input == "before_norm" else x
    predictor = Predictor(layer["fc1"], layer["fc2"], read.reshape(-1, dim).astype(jnp.float32), layer.get("threshold"))
  mask = masks.get("ffn") if "router" in layer else _no_expert(masks.get("ffn"))
  out, fired = ffn(*routed, layer["neurons"], predictor, _with_threshold(mask, layer.get("hidden_threshold")))
  if "shared" in layer:
    mask = _with_threshold(_no_expert(masks.get("shared")), layer.get("shared_hidden_threshold"))
    shared, count = ffn(*alone, layer["shared"], None, mask)
    if "shared_gate" in layer:
      shared *= jax.nn.sigmoid(jnp.einsum("btd,d->bt", x, layer["shared_gate"].astype(x.dtype)))[..., None]
    out, fired = out + shared, fired + count
  return out, fired


def _with_threshold(mask: Intervention | None, theta: Array | None) -> Intervention | None:
  return mask if theta is None else Thresholded(theta, mask)


def _no_expert(mask: Intervention | None) -> Intervention | None:
  """The intervention of a dense FFN, which reference.feed_forward takes for the expert 0."""
  return None if mask is None else lambda gate, up, hidden, _: mask(gate, up, hidden, None)
