"""Cross-entropy of next-token predictions."""

from collections.abc import Callable, Mapping
from typing import Any

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

  def block(head, x, target):
    logits = block_logits(head, x, cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - logit_of(logits, target), log_z

  return by_blocks(block, head, (hidden, "BTD"), (targets, "BT"))


def by_blocks(block: Callable, heads: Any, *arrays: tuple[Array, str], width: int | None = None) -> Any:
  """block(heads, *parts) of one block of T after the other, computed again in the backward pass.

  Args:
    block: pure; returns a tree of arrays [B, width, ...].
    heads: a tree that all blocks read.
    arrays: [B, T, ...] each, with the letters of its axes.
    width: of a block; None for T / BLOCKS.

  Returns:
    The tree of `block` with [B, T, ...].
  """
  time = arrays[0][0].shape[1]
  width = width or -(-time // BLOCKS)

  def blocks(x, axes):  # [B, T, ...] -> [blocks, B, T / blocks, ...], T padded
    x = jnp.pad(x, [(0, 0), (0, -time % width)] + [(0, 0)] * (x.ndim - 2))
    return constrain(x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1), "L" + axes)

  block = jax.checkpoint(block, prevent_cse=False)
  xs = tuple(blocks(*array) for array in arrays)
  _, found = jax.lax.scan(lambda h, xs: (h, block(h, *xs)), heads, xs)
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :time], found)


def block_logits(head: Array, x: Array, cap: float) -> Array:
  """softcap(x head), [B, T', V] float32, of a block x [B, T', D] and a head [D, V]."""
  logits = project("btd,dv->btv", x, head.astype(x.dtype), jnp.float32)
  return constrain(softcap(logits, cap), "BTV")


def logit_of(logits: Array, target: Array) -> Array:
  """The logit [B, T'] of each target [B, T'].

  A sum and not a gather, which would collect a V that is split over devices, and whose gradient is a scatter.
  """
  hit = target[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
  return jnp.sum(logits, axis=-1, where=hit)
