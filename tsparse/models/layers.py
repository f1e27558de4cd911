"""The parts of a decoder other than its FFN, as pure functions of arrays. Axis letters: models/config.py."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 (arXiv 1910.07467).

  Args:
    x: [..., D], any float dtype, which the result keeps.
    scale: [D].
    eps: added to the mean square.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype) * scale.astype(x.dtype)


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


def attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Grouped-query attention: softmax(q k^T / sqrt(H)) v, softmax in float32.

  Args:
    query: [B, T, N, H].
    key: [B, T, K, H]; N is a multiple of K, query head n uses kv head n // (N/K).
    value: [B, T, K, H].
    mask: [B, T, T] bool, true where attention is allowed.

  Returns:
    [B, T, N, H] in the dtype of `query`.
  """
  batch, time, heads, head_dim = query.shape
  grouped = query.reshape(batch, time, key.shape[2], -1, head_dim)  # [B, T, K, N/K, H]
  scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(batch, time, heads, head_dim)
