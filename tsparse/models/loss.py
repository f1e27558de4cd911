"""Cross-entropy of next-token predictions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tsparse.models.layers import project, softcap
from tsparse.sharding import constrain

Array = jax.Array

BLOCKS = 8  # of T: the logits that exist at one time are so much smaller than all of them


def scored(batch: Mapping[str, Array]) -> Array:
  """Which targets of a batch count in its loss, [B, T] bool: `loss_mask`, or all real ones where there is none."""
  return batch.get("loss_mask", batch["segment_ids"]) > 0


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
  """Negative log-likelihood of each target in nats, and log Z = logsumexp(logits), both [B, T] float32.

  Args:
    logits: [B, T, V] float32.
    targets: [B, T] int32.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
  return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def head_cross_entropy(hidden: Array, head: Array, targets: Array, cap: float = 0.0) -> tuple[Array, Array]:
  """`cross_entropy` of the logits softcap(hidden head), of which only one of BLOCKS blocks of T exists at a time.

  The backward pass computes each block's logits again. The gradient of `head` is added up over the blocks in float32.

  Args:
    hidden: [B, T, D] after the final norm, in the compute dtype.
    head: [D, V] float32, multiplied in the dtype of `hidden`.
    targets: [B, T] int32.
    cap: of the logits, see `softcap`.

  Returns:
    Negative log-likelihood and log Z, both [B, T] float32.
  """
  time = targets.shape[1]
  width = -(-time // BLOCKS)

  def blocks(x, axes):  # [B, T, ...] -> [blocks, B, T / blocks, ...], T padded
    x = jnp.pad(x, [(0, 0), (0, -time % width)] + [(0, 0)] * (x.ndim - 2))
    return constrain(x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1), "L" + axes)

  def block(head, x, target):
    logits = project("btd,vd->btv", x, head.astype(x.dtype), jnp.float32)
    logits = constrain(softcap(logits, cap), "BTV")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A sum and not a gather, which would collect a V that is split over devices, and whose gradient is a scatter.
    hit = target[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return log_z - jnp.sum(logits, axis=-1, where=hit), log_z

  block = jax.checkpoint(block, prevent_cse=False)
  xs = blocks(hidden, "BTD"), blocks(targets, "BT")
  # [V, D]: CPUs multiply tall matrices faster than wide ones where the gradient is taken
  _, losses = jax.lax.scan(lambda h, xs: (h, block(h, *xs)), head.T, xs)
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :time], losses)
