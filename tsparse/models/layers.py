"""The parts of a decoder other than its FFN, as pure functions of arrays. Axis letters: models/config.py."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float, offset: float = 0.0) -> Array:
  """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, computed in float32 (arXiv 1910.07467).

  Args:
    x: [..., D], any float dtype, which the result keeps.
    scale: [D].
    eps: added to the mean square.
    offset: if not 0, the product is taken in float32 too, as Gemma does; if 0, in the dtype of x, as Llama does.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  if offset:
    return (normed * (offset + scale)).astype(x.dtype)
  return normed.astype(x.dtype) * scale.astype(x.dtype)


def softcap(x: Array, cap: float) -> Array:
  """cap * tanh(x / cap), which stays within -cap and cap (Gemma 2, arXiv 2408.00118); x itself if cap is 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def attention_mask(segment_ids: Array, sliding_window: int) -> Array:
  """[B, T, T] bool: query t may see key s when s <= t, both are of one segment, and t - s < sliding_window.

  Args:
    segment_ids: [B, T] int32; packed documents have different ids, padding has 0.
    sliding_window: 0 means no limit.
  """
  t = jnp.arange(segment_ids.shape[1])
  distance = t[:, None] - t[None, :]  # [T, T]
  near = distance >= 0
  if sliding_window:
    near &= distance < sliding_window
  return near[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(query: Array, key: Array, value: Array, mask: Array, scalar: int = 0, cap: float = 0.0) -> Array:
  """Grouped-query attention: softmax(softcap(q k^T / sqrt(scalar))) v, softmax in float32.

  Args:
    query: [B, T, N, H].
    key: [B, T, K, H]; N is a multiple of K, query head n uses kv head n // (N/K).
    value: [B, T, K, H].
    mask: [B, T, T] bool, true where attention is allowed.
    scalar: 0 means H.
    cap: see `softcap`.

  Returns:
    [B, T, N, H] in the dtype of `query`.
  """
  batch, time, heads, head_dim = query.shape
  grouped = query.reshape(batch, time, key.shape[2], -1, head_dim)  # [B, T, K, N/K, H]
  scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
  scores = softcap(scores * (scalar or head_dim) ** -0.5, cap)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, time, heads, head_dim)
