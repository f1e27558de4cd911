"""The parts of a decoder other than its FFN, as pure functions of arrays. Axis letters: models/config.py."""

import functools

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


def project(pattern: str, x: Array, weight: Array, dtype: jnp.dtype | None = None) -> Array:
  """einsum(pattern, x, weight): every token's row times one weight, as in "btd,df->btf" or "btnh,nhd->btd".

  The weight's gradient is one product of two matrices of rows, [B T, in]^T [B T, out]. JAX's own gradient is the same
  sum, before which XLA copies an operand into transposed order on CPU: an eighth of a training step there. It is taken
  the way round that has fewer rows than columns, which is up to 1.5 times as fast there.

  Args:
    pattern: "b" and "t" are the first letters of x and of the result, and the letters which x and the weight share are
      the weight's first ones.
    x: [B, T, ...].
    weight: in the dtype of x.
    dtype: of the sums and of the result; that of x if None.
  """
  return _project(pattern, jnp.dtype(dtype or x.dtype), x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project(pattern: str, dtype: jnp.dtype, x: Array, weight: Array) -> Array:
  of_x, of_weight, _ = pattern.replace("->", ",").split(",")
  return _contracted(of_x, x, of_weight, weight, dtype)


def _project_forward(pattern: str, dtype: jnp.dtype, *saved: Array) -> tuple[Array, tuple[Array, ...]]:
  return _project(pattern, dtype, *saved), saved


def _project_backward(pattern: str, _, saved: tuple[Array, ...], dout: Array) -> tuple[Array, Array]:
  x, weight = saved
  _, of_weight, of_out = pattern.replace("->", ",").split(",")
  dx = _contracted(of_out, dout, of_weight, weight, None)
  left, right = (rows.reshape(rows.shape[0] * rows.shape[1], -1) for rows in (x, dout))
  product = jax.lax.platform_dependent(left, right, cpu=_cpu_product, default=lambda left, right: left.T @ right)
  return dx.astype(x.dtype), product.reshape(weight.shape).astype(weight.dtype)


def _cpu_product(left: Array, right: Array) -> Array:
  """left^T right, the way round that has fewer rows than columns; the barrier keeps XLA from undoing that."""
  return jax.lax.optimization_barrier(right.T @ left).T if left.shape[1] > right.shape[1] else left.T @ right


def _contracted(of_left: str, left: Array, of_right: str, right: Array, dtype: jnp.dtype | None) -> Array:
  """einsum over the letters which the two share, in their order: einsum takes another, and XLA copies for it."""
  shared = [letter for letter in of_left if letter in of_right]
  dims = tuple(tuple(letters.index(letter) for letter in shared) for letters in (of_left, of_right))
  common = jnp.promote_types(left.dtype, right.dtype)
  return jax.lax.dot_general(left.astype(common), right.astype(common), (dims, ((), ())), preferred_element_type=dtype)


_project.defvjp(_project_forward, _project_backward)
