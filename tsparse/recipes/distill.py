"""Distillation on logits: the student learns the teacher's distribution of the next token beside the token itself.

    loss of a token = (1 - w) * -log p(target) + w * T^2 KL(teacher_T || student_T)

with p_T = softmax(logits / T) (Hinton, Vinyals and Dean, arXiv 1503.02531; T^2 keeps the gradient's size). As in
models/loss.py only one block of the logits [B, T, V] exists at a time, one of the teacher's and one of the student's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsparse.models.loss import block_logits, by_blocks, logit_of

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


def distilled_cross_entropy(
  student: Read, teacher: Read, targets: Array, temperature: float = 1.0, top_k: int = 0
) -> tuple[Array, Array, Array]:
  """Cross-entropy of the student and its divergence from the teacher, which has no gradient.

  Args:
    student: has gradients.
    teacher: of the same vocabulary.
    targets: [B, T] int32.
    temperature: T.
    top_k: if not 0, the divergence is that of distributions over the teacher's `top_k` likeliest tokens and the rest
      as one: never more than the whole (information is only lost), and the backward pass needs no logits of the
      teacher, only [B, T, top_k] of its log-probabilities.

  Returns:
    -log p(target), log Z of the student (at temperature 1) and KL in nats, [B, T] float32 each.
  """
  teacher = teacher._replace(hidden=jax.lax.stop_gradient(teacher.hidden), head=jax.lax.stop_gradient(teacher.head))

  def of_student(head, x, target):
    logits = block_logits(head, x, student.cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return logits, log_z - logit_of(logits, target), log_z

  def whole(heads, x, of_teacher, target):
    logits, nll, log_z = of_student(heads[0], x, target)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(block_logits(heads[1], of_teacher, teacher.cap) / temperature))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits / temperature)), axis=-1)
    return nll, log_z, kl

  def likeliest(head, x):
    return jax.lax.top_k(jax.nn.log_softmax(block_logits(head, x, teacher.cap) / temperature), top_k)

  def coarse(head, x, log_p, index, target):
    logits, nll, log_z = of_student(head, x, target)
    log_q = jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), index, axis=-1)  # [B, T', k]
    rest_p, rest_q = _log_rest(log_p), _log_rest(log_q)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) + jnp.exp(rest_p) * (rest_p - rest_q)
    return nll, log_z, kl

  read = (student.hidden, "BTD"), (teacher.hidden, "BTD"), (targets, "BT")
  if not top_k:
    return by_blocks(whole, (student.head, teacher.head), *read)
  log_p, index = jax.lax.stop_gradient(by_blocks(likeliest, teacher.head, read[1]))  # [B, T, k]
  return by_blocks(coarse, student.head, read[0], (log_p, "BTL"), (index, "BTL"), read[2])


def _log_rest(log_p: Array) -> Array:
  """log of what the probabilities exp(log_p) [..., k] leave of 1, at least the rounding of float32."""
  return jnp.log(jnp.maximum(1 - jnp.exp(log_p).sum(-1), jnp.finfo(jnp.float32).eps))
