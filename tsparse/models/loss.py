"""Cross-entropy of next-token predictions."""

import functools
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
  block = functools.partial(_block_losses, cap=cap)
  return by_blocks(block, head, (hidden, "BTD"), (targets, "BT"))


def summed_cross_entropy(
  hidden: Array, head: Array, targets: Array, counted: Array, z_weight: float = 0.0, cap: float = 0.0
) -> tuple[Array, tuple[Array, Array]]:
  """Sum over the counted targets of  nll + z_weight * (log Z)^2,  and either sum alone, without a gradient.

  Its gradient is that of `head_cross_entropy`, for a third less: see `summed_by_blocks`.

  Args:
    hidden: as for `head_cross_entropy`, and so are head, targets and cap.
    head: see `hidden`.
    targets: see `hidden`.
    counted: [B, T] bool.
    z_weight: of the squares.
    cap: see `hidden`.

  Returns:
    [] float32 each.
  """

  def block(head, x, _, target, counted):
    nll, log_z = _block_losses(head, x, target, cap)
    nll, z = jnp.sum(nll, where=counted), jnp.sum(jnp.square(log_z), where=counted)
    return nll + z_weight * z, (nll, z)

  return summed_by_blocks(block, head, hidden, (targets, "BT"), (counted, "BT"))


def _block_losses(head: Array, x: Array, target: Array, cap: float) -> tuple[Array, Array]:
  """nll and log Z, [B, T'] each, of a block x [B, T', D]."""
  logits = block_logits(head, x, cap)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  return log_z - logit_of(logits, target), log_z


def summed_by_blocks(
  block: Callable, head: Array, hidden: Array, *arrays: tuple[Array, str], fixed: Any = None
) -> tuple[Array, Any]:
  """Sums over blocks of T of block(head, x, fixed, *parts), of which the first has a gradient.

  That is known, up to its scale, as soon as the block's logits are: it is taken in the forward pass, block by block,
  and the backward pass needs no logits, neither kept nor computed again. That of `head` is added up in float32.

  Args:
    block: pure; returns (a scalar, a tree of sums that have no gradient) for a block x [B, T', D] of hidden. A token of
      padding, where parts are zeros, adds nothing to them.
    head: [D, V] float32.
    hidden: [B, T, D].
    arrays: [B, T, ...] each, with the letters of its axes; without a gradient.
    fixed: a tree that all blocks read; without a gradient.

  Returns:
    The scalar and the tree.
  """
  xs, *others = split_time(-(-hidden.shape[1] // BLOCKS), (hidden, "BTD"), *arrays)
  return _summed(block, head, xs, fixed, others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(block: Callable, head: Array, xs: Array, fixed: Any, others: list[Array]) -> tuple[Array, Any]:
  _, sums = jax.lax.scan(lambda _, parts: (None, block(head, parts[0], fixed, *parts[1])), None, (xs, others))
  return _total(sums)


def _summed_forward(block: Callable, head: Array, xs: Array, fixed: Any, others: list[Array]):
  """The sums, and what is kept: the gradients of the first by head and xs."""

  def add(total, parts):
    x, rest = parts
    sums, (dhead, dx) = jax.value_and_grad(block, (0, 1), has_aux=True)(head, x, fixed, *rest)
    return constrain(total + dhead, "DV"), (sums, dx)

  total, (sums, dxs) = jax.lax.scan(add, constrain(jnp.zeros_like(head), "DV"), (xs, others))
  return _total(sums), (total, dxs)


def _summed_backward(block: Callable, gradients: tuple[Array, Array], dsums: tuple[Array, Any]) -> tuple[Any, ...]:
  del block
  return *((dsums[0] * gradient).astype(gradient.dtype) for gradient in gradients), None, None


def _total(sums: Any) -> Any:
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


_summed.defvjp(_summed_forward, _summed_backward)


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
  block = jax.checkpoint(block, prevent_cse=False)
  parts = split_time(width or -(-time // BLOCKS), *arrays)
  _, found = jax.lax.scan(lambda h, parts: (h, block(h, *parts)), heads, parts)
  return jax.tree.map(lambda x: joined_time(x, time), found)


def split_time(width: int, *arrays: tuple[Array, str]) -> tuple[Array, ...]:
  """[B, T, ...] with the letters of its axes, each -> [blocks, B, width, ...], zeros behind T."""

  def blocks(x, axes):
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % width)] + [(0, 0)] * (x.ndim - 2))
    return constrain(x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1), "L" + axes)

  return tuple(blocks(*array) for array in arrays)


def joined_time(x: Array, time: int) -> Array:
  """[blocks, B, width, ...] -> [B, T, ...], `time` long."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :time]


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
