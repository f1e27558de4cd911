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
