"""Interventions on the FFN hidden, as pytrees that are called with (gate, up, hidden). Levels are traced values."""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

DEFINITIONS = {
  "sparsity": "share of the hidden entries of one FFN (of each routed expert) set to zero for each token: those of "
  "smallest |hidden|, exactly round(sparsity * F) of them, entries that were zero already included "
  "(Turbo Sparse, arXiv 2406.05955, eq. 3-4)",
}


def largest(x: Array, k: Array) -> Array:
  """Mask of the k largest entries of the last axis, exactly k of them: among equals the lower index is kept.

  The k-th largest value is found by bisection on the bits of the floats, 31 counting passes and no sort; `k` is traced.

  Args:
    x: [..., F] float32, non-negative.
    k: [] int32, 0 <= k <= F.

  Returns:
    [..., F] bool.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)  # of non-negative floats: ordered as the floats are

  def narrow(i, threshold):  # largest threshold with at least k entries >= it, from the highest bit down
    candidate = threshold | (1 << (30 - i))
    enough = jnp.sum(bits >= candidate, axis=-1, keepdims=True) >= k
    return jnp.where(enough, candidate, threshold)

  threshold = jax.lax.fori_loop(0, 31, narrow, jnp.zeros_like(bits[..., :1]))
  above, equal = bits > threshold, bits == threshold
  room = k - jnp.sum(above, axis=-1, keepdims=True)  # how many of the equal ones are kept
  return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))


@struct.dataclass
class TopK:
  """Keeps the F - round(sparsity * F) entries of largest |hidden| of each token and zeroes the others.

  Turbo Sparse (arXiv 2406.05955) eq. 3-4: Mask(x) = Topk(|Combined(x)|), out = (Combined(x) * Mask(x)) W_down.

  Attributes:
    sparsity: [L] float32 in [0, 1), the slice of layer l is a scalar.
  """

  sparsity: Array

  def __call__(self, gate: Array, up: Array, hidden: Array) -> Array:
    """Masked hidden [..., F]."""
    del gate, up
    dropped = jnp.round(self.sparsity * hidden.shape[-1]).astype(jnp.int32)
    keep = largest(jnp.abs(hidden).astype(jnp.float32), hidden.shape[-1] - dropped)
    return jnp.where(keep, hidden, 0)


def topk_everywhere(sparsity: float, num_layers: int) -> TopK:
  """The same level in every layer."""
  return TopK(jnp.full((num_layers,), sparsity, jnp.float32))
