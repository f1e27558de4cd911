"""One training step, a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tsparse.models.counts import (
  ModelCounts,
  dead_neurons,
  expert_load_entropy,
  model_zero_fraction,
  zero_fraction,
  zero_fraction_per_layer,
)
from tsparse.models.loss import scored
from tsparse.models.transformer import Transformer, token_losses
from tsparse.sharding import constrain

Batch = dict[str, jax.Array]  # inputs, targets, segment_ids, positions, loss_mask: [B, T] int32


@struct.dataclass
class TrainState:
  """Everything that training changes, but for the position in the data."""

  step: jax.Array  # [] int32, optimizer steps taken
  params: Any
  opt_state: Any


@struct.dataclass
class Sums:
  """Sums over the tokens of one or several microbatches."""

  nll: jax.Array  # [] float32, nats
  log_z_squared: jax.Array  # [] float32
  counts: ModelCounts


def summed_loss(params: Any, batch: Batch, model: Transformer, z_loss: float) -> tuple[jax.Array, Sums]:
  """Sum over the batch's scored tokens of  -log p(target) + z_loss * (log Z)^2  (z-loss: PaLM, arXiv 2204.02311)."""
  nll, log_z, counts = token_losses(model, params, batch)  # [B, T]
  counted = scored(batch)
  sums = Sums(
    nll=jnp.sum(nll, where=counted),
    log_z_squared=jnp.sum(jnp.square(log_z), where=counted),
    counts=jax.lax.stop_gradient(counts),
  )
  return sums.nll + z_loss * sums.log_z_squared, sums


def summed_gradients(
  params: Any, batch: Batch, model: Transformer, z_loss: float, microbatches: int
) -> tuple[Any, Sums]:
  """Gradient of `summed_loss` over the whole batch, computed `microbatches` at a time.

  Each microbatch's gradients are added where their sum lies, layer by layer as the backward pass comes by: there is no
  second copy of them.
  """
  if microbatches == 1:
    return jax.grad(summed_loss, has_aux=True)(params, batch, model, z_loss)

  def split(x):  # row r goes to microbatch r % A, so that every device keeps its own rows
    return constrain(x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1), "LBT")  # [A, B/A, T]

  total = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

  def add(sums, microbatch):
    loss, backward, more = jax.vjp(lambda p: summed_loss(p, microbatch, model, z_loss), params, has_aux=True)
    backward.with_refs(total)(jnp.ones_like(loss))
    return jax.tree.map(jnp.add, sums, more), None

  batch = jax.tree.map(split, batch)
  sums = jax.eval_shape(lambda b: summed_loss(params, b, model, z_loss)[1], jax.tree.map(lambda x: x[0], batch))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  sums = jax.lax.scan(add, zeros, batch)[0]
  return jax.tree.map(jax.ref.freeze, total), sums


def make_train_step(
  model: Transformer,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  z_loss: float,
  microbatches: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """A function (state, batch) -> (state, metrics). The loss is the mean over all scored tokens of the whole batch."""

  def train_step(state: TrainState, batch: Batch):
    batch = {name: constrain(x, "BT") for name, x in batch.items()}
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    counted = jnp.maximum(jnp.sum(scored(batch)), 1).astype(jnp.float32)
    grads, sums = summed_gradients(state.params, batch, model, z_loss, microbatches)
    grads = jax.tree.map(lambda g: g / counted, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": sums.nll / counted,
      "z_loss": z_loss * sums.log_z_squared / counted,
      "grad_norm": optax.tree_utils.tree_norm(grads),
      "learning_rate": schedule(state.step),
      "tokens": tokens,
      "zero_fraction": model_zero_fraction(sums.counts),
      "zero_fraction_per_layer": zero_fraction_per_layer(sums.counts),  # [L]
      "zero_fraction_per_expert": zero_fraction(sums.counts["ffn"]),  # [L, E]
      "dead_neurons": sum(jnp.sum(dead_neurons(c)) for c in sums.counts.values()),  # in this batch
      "tokens_per_expert": sums.counts["ffn"].routed,  # [L, E]
    }
    if model.config.num_experts:
      metrics["expert_load_entropy_per_layer"] = expert_load_entropy(sums.counts["ffn"])  # [L]
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return train_step
