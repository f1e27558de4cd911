"""Cross-entropy of next-token predictions."""

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
  """Negative log-likelihood of each target in nats, and log Z = logsumexp(logits), both [B, T] float32.

  Args:
    logits: [B, T, V] float32.
    targets: [B, T] int32.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
  return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z
