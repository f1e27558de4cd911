"""One training step, a pure function of (state, batch)."""

from collections.abc import Callable, Mapping
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
from tsparse.models.router import Jitter, router_balance_loss, router_z_loss
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
  """Sums over the tokens of one or several microbatches, [] float32 each.

  Attributes:
    nll: nats.
    added: the terms that are added to it, by name, before they are weighted.
    counts: of the hidden.
  """

  nll: jax.Array
  added: dict[str, jax.Array]
  counts: ModelCounts


ROUTER_LOSSES = ("router_z_loss", "router_balance_loss")  # their definitions: tsparse/models/router.py


def summed_loss(
  params: Any, batch: Batch, model: Transformer, weights: Mapping[str, float], router_jitter: float = 0.0
) -> tuple[jax.Array, Sums]:
  """Sum over the batch's scored tokens of  -log p(target) + sum over the added terms of weight * term.

  Args:
    params: of the model.
    batch: with router_jitter also router_keys, [B, L] random keys.
    model: the decoder.
    weights: of z_loss, (log Z)^2 (PaLM, arXiv 2204.02311), and of ROUTER_LOSSES, means over all real tokens which every
      scored token shares equally and which are not computed when both weigh 0.
    router_jitter: epsilon of the routers' Jitter.
  """
  jitter = Jitter(batch["router_keys"].T, router_jitter) if router_jitter else None
  with_router = any(weights.get(name) for name in ROUTER_LOSSES)
  nll, log_z, counts, router = token_losses(model, params, batch, jitter=jitter, with_router=with_router)  # [B, T]
  counts, counted = jax.lax.stop_gradient(counts), scored(batch)
  added = {"z_loss": jnp.sum(jnp.square(log_z), where=counted)}
  if with_router:
    tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32), 1)
    sharing = jnp.sum(counted, dtype=jnp.float32)
    added["router_z_loss"] = sharing * router_z_loss(router, tokens)
    added["router_balance_loss"] = sharing * router_balance_loss(router, counts["ffn"].routed, tokens)
  sums = Sums(nll=jnp.sum(nll, where=counted), added=added, counts=counts)
  return sums.nll + sum(weights[name] * term for name, term in added.items()), sums


def summed_gradients(
  params: Any, batch: Batch, model: Transformer, weights: Mapping[str, float], router_jitter: float, microbatches: int
) -> tuple[Any, Sums]:
  """Gradient of `summed_loss` over the whole batch, computed `microbatches` at a time.

  Each microbatch's gradients are added where their sum lies, layer by layer as the backward pass comes by: there is no
  second copy of them.
  """
  if microbatches == 1:
    return jax.grad(summed_loss, has_aux=True)(params, batch, model, weights, router_jitter)

  def split(x):  # row r goes to microbatch r % A, so that every device keeps its own rows
    return constrain(x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1), "LBT")  # [A, B/A, T]

  total = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

  def loss_of(params, microbatch):
    return summed_loss(params, microbatch, model, weights, router_jitter)

  def add(sums, microbatch):
    loss, backward, more = jax.vjp(lambda p: loss_of(p, microbatch), params, has_aux=True)
    backward.with_refs(total)(jnp.ones_like(loss))
    return jax.tree.map(jnp.add, sums, more), None

  batch = jax.tree.map(split, batch)
  sums = jax.eval_shape(lambda b: loss_of(params, b)[1], jax.tree.map(lambda x: x[0], batch))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  sums = jax.lax.scan(add, zeros, batch)[0]
  return jax.tree.map(jax.ref.freeze, total), sums


def make_train_step(
  model: Transformer,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  weights: Mapping[str, float],
  router_jitter: float,
  seed: int,
  microbatches: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """A function (state, batch) -> (state, metrics). The loss is the mean over all scored tokens of the whole batch.

  Args:
    model: the decoder.
    tx: the optimizer.
    schedule: its learning rate, for the metrics.
    weights: see `summed_loss`; the metric of that name is the term as it is added, the metric "loss" has none of them.
    router_jitter: see `summed_loss`; the noise of a row depends on the seed, the step, the layer and the row alone.
    seed: of that noise.
    microbatches: the batch is computed in so many pieces.
  """

  def train_step(state: TrainState, batch: Batch):
    batch = {name: constrain(x, "BT") for name, x in batch.items()}
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    counted = jnp.maximum(jnp.sum(scored(batch)), 1).astype(jnp.float32)
    if router_jitter:
      key = jax.random.fold_in(jax.random.key(seed), state.step)
      batch["router_keys"] = jax.random.split(key, (batch["inputs"].shape[0], model.config.num_layers))  # [B, L]
    grads, sums = summed_gradients(state.params, batch, model, weights, router_jitter, microbatches)
    grads = jax.tree.map(lambda g: g / counted, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      "loss": sums.nll / counted,
      **{name: weights[name] * term / counted for name, term in sums.added.items()},
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
