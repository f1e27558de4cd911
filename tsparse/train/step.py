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
  penalty_per_layer,
  zero_fraction,
  zero_fraction_per_layer,
)
from tsparse.models.loss import scored, summed_cross_entropy
from tsparse.models.router import Jitter, router_balance_loss, router_z_loss
from tsparse.models.transformer import FFNPass, Transformer, ffn_passes, final_hidden, head_of
from tsparse.recipes import guards
from tsparse.recipes.distill import Read, summed_distillation
from tsparse.recipes.match import matching_loss, squared_aims
from tsparse.recipes.recipe import Recipe
from tsparse.recipes.teacher import Teacher
from tsparse.sharding import constrain
from tsparse.train.optimizer import passed

Batch = dict[str, jax.Array]  # inputs, targets, segment_ids, positions, loss_mask: [B, T] int32


@struct.dataclass
class TrainState:
  """Everything that training changes, but for the position in the data."""

  step: jax.Array  # [] int32, optimizer steps taken
  params: Any
  opt_state: Any
  memory: Any = None  # of the recipe (tsparse/recipes/recipe.py)


@struct.dataclass
class Sums:
  """Sums over the tokens of one or several microbatches, [] float32 each. To be read: the loss has the gradient.

  Attributes:
    nll: nats.
    added: the terms that are added to it, by name, before they are weighted.
    counts: of the hidden.
  """

  nll: jax.Array
  added: dict[str, jax.Array]
  counts: ModelCounts


@struct.dataclass
class Extra:
  """What a recipe adds to the loss at a step.

  Attributes:
    recipe: static.
    teacher: static; None where there is none.
    step: [] int32.
    weights: lambda of each layer, [L] or [1]; None without a penalty.
    own: the parameters that the teacher alone has.
  """

  recipe: Recipe = struct.field(pytree_node=False)
  teacher: Teacher | None = struct.field(pytree_node=False)
  step: jax.Array
  weights: jax.Array | None
  own: Any


@struct.dataclass
class Totals:
  """What the terms of the loss of some microbatches need to know of the whole batch. Nothing here has a gradient.

  Attributes:
    scored: [] float32, tokens whose prediction is scored.
    tokens: [] float32, real tokens.
    routed: [L, E] float32, token-choices that each expert got; None where the balance loss weighs 0.
    aims: by stack of layers [L] float32, the squared norm of what the teacher's FFNs gave; None without matching.
  """

  scored: jax.Array
  tokens: jax.Array
  routed: jax.Array | None = None
  aims: dict[str, jax.Array] | None = None


def _read(model: Transformer, params: Any, hidden: jax.Array) -> Read:
  return Read(hidden, head_of(model, params), model.config.final_softcap)


ROUTER_LOSSES = ("router_z_loss", "router_balance_loss")  # their definitions: tsparse/models/router.py


def _asked(batch: Batch, router_jitter: float, extra: Extra | None) -> dict[str, Any]:
  """The intervention and the jitter of a forward pass of training."""
  intervention = extra.recipe.intervention(extra.step) if extra else None
  return {
    "intervention": intervention,
    "jitter": Jitter(batch["router_keys"].T, router_jitter) if router_jitter else None,
  }


def _of_teacher(params: Any, batch: Batch, extra: Extra) -> tuple[Any, jax.Array, dict[str, FFNPass] | None]:
  """The teacher's parameters, the hidden that its head reads, and what its FFNs read and gave if they are matched."""
  theirs = jax.lax.stop_gradient(extra.teacher.whole(extra.own, params))
  if extra.recipe.match_steps:
    return theirs, *jax.lax.stop_gradient(ffn_passes(extra.teacher.model, theirs, batch))
  return theirs, jax.lax.stop_gradient(final_hidden(extra.teacher.model, theirs, batch)[0]), None


def _totals(batch: Batch) -> Totals:
  """Those that the tokens of a batch alone tell, in one piece or in microbatches."""
  tokens = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
  return Totals(jnp.sum(scored(batch), dtype=jnp.float32), jnp.maximum(tokens, 1))


def summed_loss(
  params: Any,
  batch: Batch,
  model: Transformer,
  weights: Mapping[str, float],
  router_jitter: float = 0.0,
  extra: Extra | None = None,
  totals: Totals | None = None,
) -> tuple[jax.Array, Sums]:
  """Sum over the batch's scored tokens of  -log p(target) + sum over the added terms of weight * term.

  The terms that are means over real tokens (those of the routers, the penalty, the matching) are means over all real
  tokens of the whole batch, scored or not, and every scored token of the whole batch has them once. So the sums of
  microbatches, with the `totals` of the whole, add up to the sum of the whole, and their gradients do.

  Args:
    params: of the model.
    batch: with router_jitter also router_keys, [B, L] random keys.
    model: the decoder.
    weights: of z_loss, (log Z)^2 (PaLM, arXiv 2204.02311), and of ROUTER_LOSSES, which are not computed when both weigh
      0.
    router_jitter: epsilon of the routers' Jitter.
    extra: of a recipe. Its terms are weighted already: `sparsity_penalty`, lambda times the penalty, and
      `distillation`, w T^2 KL, beside which -log p(target) weighs 1 - w only. While the FFNs are matched the loss is
      `matching` alone, which has as much weight as all tokens together.
    totals: of the whole batch, of which `batch` is a microbatch; None where it is the whole.
  """
  with_router = any(weights.get(name) for name in ROUTER_LOSSES)
  asked = _asked(batch, router_jitter, extra)
  counted, totals = scored(batch), totals or _totals(batch)
  distill = extra.recipe.distill_weight if extra else 0.0
  teacher_hidden, passes = None, None
  if extra and extra.teacher:
    theirs, teacher_hidden, passes = _of_teacher(params, batch, extra)

  def whole(params: Any) -> tuple[jax.Array, Sums]:
    hidden, counts, router = final_hidden(model, params, batch, **asked, with_router=with_router)
    read, z_weight = _read(model, params, hidden), weights.get("z_loss", 0.0)
    if distill:
      recipe, of_teacher = extra.recipe, _read(extra.teacher.model, theirs, teacher_hidden)
      how = distill, z_weight, recipe.temperature, recipe.top_k
      loss, (nll, z_loss, kl) = summed_distillation(read, of_teacher, batch["targets"], counted, *how)
      included, added = {"z_loss": z_loss, "distillation": kl}, {}
    else:
      loss, (nll, z_loss) = summed_cross_entropy(*read[:2], batch["targets"], counted, z_weight, read.cap)
      included, added = {"z_loss": z_loss}, {}
    penalty = penalty_per_layer(counts) if extra and extra.weights is not None else None
    counts = jax.lax.stop_gradient({kind: c.replace(penalty=None) for kind, c in counts.items()})
    if with_router:
      routed = counts["ffn"].routed if totals.routed is None else totals.routed
      added["router_z_loss"] = totals.scored * router_z_loss(router, totals.tokens)
      added["router_balance_loss"] = totals.scored * router_balance_loss(router, routed, totals.tokens)
    if penalty is not None:
      added["sparsity_penalty"] = totals.scored * jnp.sum(extra.weights * penalty) / totals.tokens
    loss += sum(weights.get(name, 1.0) * term for name, term in added.items())
    return loss, Sums(nll=nll, added=included | added, counts=counts)

  if not passes:
    return whole(params)
  valid = batch["segment_ids"] > 0
  aims = squared_aims(passes, valid) if totals.aims is None else totals.aims

  def matching(params: Any) -> tuple[jax.Array, Sums]:
    _, sums = whole(jax.lax.stop_gradient(params))
    loss = totals.scored * matching_loss(model, params, passes, aims, valid, asked["intervention"] or {})
    return loss, sums.replace(added=jax.tree.map(jnp.zeros_like, sums.added) | {"matching": loss})

  def after(params: Any) -> tuple[jax.Array, Sums]:
    loss, sums = whole(params)
    return loss, sums.replace(added=sums.added | {"matching": jnp.zeros_like(loss)})

  return jax.lax.cond(extra.step < extra.recipe.match_steps, matching, after, params)


def summed_gradients(
  params: Any,
  batch: Batch,
  model: Transformer,
  weights: Mapping[str, float],
  router_jitter: float,
  microbatches: int,
  scale: jax.Array,
  extra: Extra | None = None,
) -> tuple[Any, Sums]:
  """Gradient of `scale` times `summed_loss` over the whole batch, computed `microbatches` at a time.

  Each microbatch's gradients are added where their sum lies, layer by layer as the backward pass comes by: there is no
  second copy of them. The scale is what the backward pass begins with, so that nothing need be read again for it.
  """

  def loss_of(params, batch, totals=None):
    return summed_loss(params, batch, model, weights, router_jitter, extra, totals)

  if microbatches == 1:
    _, backward, sums = jax.vjp(lambda p: loss_of(p, batch), params, has_aux=True)
    return backward(scale)[0], sums

  def split(x):  # row r goes to microbatch r % A, so that every device keeps its own rows
    return constrain(x.reshape(-1, microbatches, x.shape[1]).swapaxes(0, 1), "LBT")  # [A, B/A, T]

  total = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)
  batch = jax.tree.map(split, batch)
  totals = whole_totals(params, batch, model, weights, router_jitter, extra)

  def add(microbatch):
    _, backward, more = jax.vjp(lambda p: loss_of(p, microbatch, totals), params, has_aux=True)
    backward.with_refs(total)(scale)
    return more

  sums = _added_up(add, batch, _zeros(lambda b: loss_of(params, b, totals)[1], batch))
  return jax.tree.map(jax.ref.freeze, total), sums


def _zeros(function: Callable[[Batch], Any], microbatches: Batch) -> Any:
  """Zeros of what the function gives for a microbatch."""
  found = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches))
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)


def _added_up(function: Callable[[Batch], Any], microbatches: Batch, zeros: Any) -> Any:
  """The sum of what the function gives for the microbatches, one after the other."""
  return jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, function(one)), None), zeros, microbatches)[0]


def whole_totals(
  params: Any,
  microbatches: Batch,
  model: Transformer,
  weights: Mapping[str, float],
  router_jitter: float,
  extra: Extra | None,
) -> Totals:
  """The Totals of a batch in microbatches, [A, B/A, T].

  What stands beside a gradient in a product, or below it in a quotient, must be known before the first backward pass:
  the experts' shares of the whole batch, and the norms that the matching is relative to. Where there are such terms,
  they take a forward pass of the layers over all microbatches, without head and gradient (of the teacher, for the
  matching, and as long as that lasts).
  """
  totals = _totals(microbatches)

  def routed(one):
    return final_hidden(model, params, one, **_asked(one, router_jitter, extra))[1]["ffn"].routed

  def aims(one):
    return squared_aims(_of_teacher(params, one, extra)[2], one["segment_ids"] > 0)

  if weights.get("router_balance_loss"):
    totals = totals.replace(routed=_added_up(routed, microbatches, _zeros(routed, microbatches)))
  if extra and extra.recipe.match_steps:
    none = _zeros(aims, microbatches)
    matched = extra.step < extra.recipe.match_steps
    found = jax.lax.cond(matched, lambda: _added_up(aims, microbatches, none), lambda: none)
    totals = totals.replace(aims=found)
  return jax.lax.stop_gradient(totals)


def make_train_step(
  model: Transformer,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  weights: Mapping[str, float],
  router_jitter: float,
  seed: int,
  microbatches: int,
  recipe: Recipe | None = None,
  teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """A function (state, batch) -> (state, metrics). The loss is the mean over all scored tokens of the whole batch.

  Where none is scored there is nothing to learn: the step is counted and the learning rate's schedule goes on, but
  parameters, moments and the recipe's memory stay bit for bit as they were, and what is a mean over scored tokens is
  NaN.

  Args:
    model: the decoder.
    tx: the optimizer.
    schedule: its learning rate, for the metrics.
    weights: see `summed_loss`; the metric of that name is the term as it is added, the metric "loss" has none of them.
    router_jitter: see `summed_loss`; the noise of a row depends on the seed, the step, the layer and the row alone.
    seed: of that noise.
    microbatches: the batch is computed in so many pieces.
    recipe: what makes zeros; None for nothing.
    teacher: whom the recipe learns from. The function then has a third argument, the parameters that are its own.
  """

  def train_step(state: TrainState, batch: Batch, own: Any = None):
    batch = {name: constrain(x, "BT") for name, x in batch.items()}
    tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    counted = jnp.sum(scored(batch)).astype(jnp.float32)
    learned = counted > 0
    scale = 1 / jnp.maximum(counted, 1)
    if router_jitter:
      key = jax.random.fold_in(jax.random.key(seed), state.step)
      batch["router_keys"] = jax.random.split(key, (batch["inputs"].shape[0], model.config.num_layers))  # [B, L]
    extra = recipe and Extra(recipe, teacher, state.step, recipe.weights(state.step, state.memory), own)
    grads, sums = summed_gradients(state.params, batch, model, weights, router_jitter, microbatches, scale, extra)

    def update(grads, params, opt_state, memory):
      norm = optax.tree_utils.tree_norm(grads)  # here, where the optimizer needs it too
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      if recipe:
        params, memory = recipe.moved(params, sums.counts), recipe.remember(memory, sums.counts, state.step)
      if recipe and recipe.revive_every:
        params, opt_state, memory = revived(recipe, tx, seed, state.step + 1, params, opt_state, memory)
      return norm, params, opt_state, memory

    def skip(grads, params, opt_state, memory):
      return optax.tree_utils.tree_norm(grads), params, passed(opt_state), memory

    # a branch, in which buffers are written in place: a select of old and new would copy the moments
    now = state.params, state.opt_state, state.memory
    norm, params, opt_state, memory = jax.lax.cond(learned, update, skip, grads, *now)
    shared = jnp.where(learned, counted, jnp.nan)  # no token, no mean
    metrics = {
      "loss": sums.nll / shared,
      **{name: weights.get(name, 1.0) * term / shared for name, term in sums.added.items()},
      "grad_norm": norm,
      "learning_rate": schedule(state.step),
      "tokens": tokens,
      "scored_tokens": counted,
      "zero_fraction": model_zero_fraction(sums.counts),
      "zero_fraction_per_layer": zero_fraction_per_layer(sums.counts),  # [L]
      "zero_fraction_per_expert": zero_fraction(sums.counts["ffn"]),  # [L, E]
      "dead_neurons": sum(jnp.sum(dead_neurons(c)) for c in sums.counts.values()),  # in this batch
      "tokens_per_expert": sums.counts["ffn"].routed,  # [L, E]
    }
    if model.config.num_experts:
      metrics["expert_load_entropy_per_layer"] = expert_load_entropy(sums.counts["ffn"])  # [L]
    if recipe:
      metrics |= recipe.metrics(state.step, state.memory)
    if recipe and recipe.dead_after:
      metrics |= guards.metrics(memory["idle"], recipe.dead_after)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, memory=memory), metrics

  return train_step


def revived(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  seed: int,
  step: jax.Array,
  params: Any,
  opt_state: Any,
  memory: dict[str, Any],
) -> tuple[Any, Any, dict[str, Any]]:
  """Parameters, optimizer state and memory after `step` steps, dead neurons made anew if it is the time for it."""

  def anew(params, opt_state, idle):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return guards.revive(params, opt_state, idle, tx, recipe.dead_after, key)

  keep = lambda *parts: parts  # noqa: E731
  parts = jax.lax.cond(step % recipe.revive_every == 0, anew, keep, params, opt_state, memory["idle"])
  return *parts[:2], memory | {"idle": parts[2]}
