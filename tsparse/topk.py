"""The k largest entries of a row, exactly and without a sort."""

import jax
import jax.numpy as jnp

Array = jax.Array


def largest(x: Array, k: Array) -> Array:
  """Mask of the k largest entries of the last axis, and of zeros never; among equals the lower index is kept.

  The k-th largest value is found by bisection on the bits of the floats, 31 counting passes and no sort, and among
  equal ones the index of the last that is kept likewise. On one device it ends as soon as k entries of every row are
  above the threshold, and the index is bisected only where equal values straddle the k-th. `k` is traced.

  Args:
    x: [..., F] float32, non-negative.
    k: int32 that broadcasts to [..., 1], 0 <= k <= F.

  Returns:
    [..., F] bool; min(k, number of positive entries) of a row are true.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)  # of non-negative floats: ordered as the floats are

  def count(mask):
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

  def any_row(left):  # on several devices the question would cost more than the passes: each a collective
    mesh = jax.sharding.get_abstract_mesh()
    return jnp.any(left) if mesh.empty or mesh.size == 1 else True

  def narrow(state):  # from the highest bit down, to the largest threshold with at least k entries >= it
    i, threshold, above = state
    candidate = threshold | (1 << (30 - i))
    found = count(bits >= candidate)
    return i + 1, jnp.where(found >= k, candidate, threshold), jnp.where(found >= k, found, above)

  k = jnp.minimum(k, count(bits > 0))
  start = (0, jnp.zeros_like(k), jnp.full_like(k, x.shape[-1]))
  _, threshold, above = jax.lax.while_loop(lambda s: (s[0] < 31) & any_row(s[2] != k), narrow, start)

  def first_of_equals(_):
    equal, index = bits == threshold, jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    room, steps = k - count(bits > threshold), x.shape[-1].bit_length()  # so many of the equal ones are kept

    def narrow(i, end):  # to the largest end with at most `room` equal entries before it
      candidate = end | (1 << (steps - 1 - i))
      return jnp.where(count(equal & (index < candidate)) <= room, candidate, end)

    end = jax.lax.fori_loop(0, steps, narrow, jnp.zeros_like(threshold))
    return (bits > threshold) | (equal & (index < end))

  return jax.lax.cond(any_row(above != k), first_of_equals, lambda _: bits >= threshold, None)


def kept(sparsity: Array, neurons: int) -> Array:
  """How many of the neurons are kept at a level: neurons - round(sparsity * neurons), int32."""
  return neurons - jnp.round(sparsity * neurons).astype(jnp.int32)
