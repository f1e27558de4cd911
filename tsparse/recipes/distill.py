"""Distillation on logits: the student learns the teacher's distribution of the next token beside the token itself.

    loss of a token = (1 - w) * -log p(target) + w * T^2 KL(teacher_T || student_T)

with p_T = softmax(logits / T) (Hinton, Vinyals and Dean, arXiv 1503.02531; T^2 keeps the gradient's size). As in
models/loss.py only one block of the logits [B, T, V] exists at a time, one of the teacher's and one of the student's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsparse.models.loss import block_logits, by_blocks, logit_of, summed_by_blocks

Array = jax.Array


class Read(NamedTuple):
  """What makes a model's logits softcap(hidden head).

  Attributes:
    hidden: [B, T, D] after the final norm, in the compute dtype.
    head: [D, V] float32.
    cap: of the logits.
  """

  hidden: Array
  head: Array
  cap: float = 0.0


def summed_distillation(
  student: Read,
  teacher: Read,
  targets: Array,
  counted: Array,
  weight: float,
  z_weight: float = 0.0,
  temperature: float = 1.0,
  top_k: int = 0,
) -> tuple[Array, tuple[Array, Array, Array]]:
  """Sum over the counted targets of the loss above, plus z_weight * (log Z)^2, and the sums of its terms.

  Args:
    student: alone has gradients.
    teacher: of the same vocabulary.
    targets: [B, T] int32.
    counted: [B, T] bool.
    weight: w.
    z_weight: of the squares of the student's log Z (at temperature 1).
    temperature: T.
    top_k: if not 0, the divergence is that of distributions over the teacher's `top_k` likeliest tokens and the rest
      as one: never more than the whole (information is only lost), and while the student's logits exist the teacher is
      [B, T', top_k] of its log-probabilities only.

  Returns:
    The loss, and without a gradient -log p(target), (log Z)^2 and w T^2 KL: [] float32 each.
  """

  def losses(logits, target, counted, kl):
    log_z = jax.nn.logsumexp(logits, axis=-1)
    by_token = log_z - logit_of(logits, target), jnp.square(log_z), weight * temperature**2 * kl
    nll, z, kl = (jnp.sum(x, where=counted) for x in by_token)
    return (1 - weight) * nll + z_weight * z + kl, (nll, z, kl)

  def whole(head, x, of_teacher, target, counted, theirs):
    logits = block_logits(head, x, student.cap)
    log_p = jax.nn.log_softmax(block_logits(of_teacher, theirs, teacher.cap) / temperature)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits / temperature)), axis=-1)
    return losses(logits, target, counted, kl)

  def likeliest(head, x):
    return jax.lax.top_k(jax.nn.log_softmax(block_logits(head, x, teacher.cap) / temperature), top_k)

  def coarse(head, x, _, target, counted, log_p, index):
    logits = block_logits(head, x, student.cap)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), index, axis=-1)  # [B, T', k]
    rest_p, rest_q = _log_rest(log_p), _log_rest(log_q)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) + jnp.exp(rest_p) * (rest_p - rest_q)
    return losses(logits, target, counted, kl)

  of_targets = (targets, "BT"), (counted, "BT")
  if not top_k:
    theirs = (teacher.hidden, "BTD")
    return summed_by_blocks(whole, student.head, student.hidden, *of_targets, theirs, fixed=teacher.head)
  log_p, index = by_blocks(likeliest, teacher.head, (teacher.hidden, "BTD"))  # [B, T, k]
  return summed_by_blocks(coarse, student.head, student.hidden, *of_targets, (log_p, "BTL"), (index, "BTL"))


def _log_rest(log_p: Array) -> Array:
  """log of what the probabilities exp(log_p) [..., k] leave of 1, at least the rounding of float32."""
  return jnp.log(jnp.maximum(1 - jnp.exp(log_p).sum(-1), jnp.finfo(jnp.float32).eps))
