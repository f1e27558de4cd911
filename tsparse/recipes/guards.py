"""Neurons that never fire, layers that are all zeros, experts that get no token: noticed while it happens, and mended.

A neuron is dead when it has not fired in `dead_after` steps in which tokens reached its expert. A revived one gets new
random gate and up weights, as long as those of the living ones of its FFN (where none lives, as those of a new model,
whose entries are of size 1 / sqrt(D)), a row of zeros in `down`, so that the model computes what it did, and fresh
moments (as dead features of sparse autoencoders are resampled, Bricken et al. 2023, "Towards Monosemanticity", here
without weighting by loss).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.models.counts import ModelCounts
from tsparse.models.ffn_params import ffn_of, with_ffn
from tsparse.recipes.lowrank import Factors
from tsparse.recipes.trained import map_moments

Array = jax.Array
# By kind of FFN: neurons [L, E, F] and experts [L, E], int32 steps without a sign of life.
Idle = dict[str, dict[str, Array]]


def init(config: ModelConfig) -> Idle:
  """Nothing has been idle before the first step."""
  widths = {"ffn": config.d_ff, "shared": config.num_shared_experts * config.shared_d_ff, "first": config.dense_d_ff}

  def zeros(kind, layers):
    experts = (layers, max(1, config.num_experts) if kind == "ffn" else 1)
    return {"neurons": jnp.zeros((*experts, widths[kind]), jnp.int32), "experts": jnp.zeros(experts, jnp.int32)}

  return {kind: zeros(kind, layers) for kind, layers in ffn_layers(config).items()}


def update(idle: Idle, counts: ModelCounts) -> Idle:
  """The counters after a step with these counts."""

  def of(steps, seen):
    reached = seen.routed > 0  # [L, E]
    neurons = jnp.where(seen.fired > 0, 0, steps["neurons"] + reached[..., None])
    return {"neurons": neurons, "experts": jnp.where(reached, 0, steps["experts"] + 1)}

  return {kind: of(idle[kind], counts[kind]) for kind in idle}


def dead(idle: Idle, dead_after: int) -> dict[str, Array]:
  """By kind of FFN, [L, E, F] bool: neurons that are dead."""
  return {kind: steps["neurons"] >= dead_after for kind, steps in idle.items()}


def metrics(idle: Idle, dead_after: int) -> dict[str, Array]:
  """What is logged: dead neurons and dead experts of each layer of each kind, [L] int32."""
  result = {}
  for kind, steps in idle.items():
    name = "" if kind == "ffn" else f"_{kind}"
    result[f"dead{name}_neurons_per_layer"] = (steps["neurons"] >= dead_after).sum((1, 2), dtype=jnp.int32)
    if steps["experts"].shape[1] > 1:
      result["dead_experts_per_layer"] = (steps["experts"] >= dead_after).sum(1, dtype=jnp.int32)
  return result


def alarms(seen: Mapping[str, Any], told: set[str], dead_after: int) -> list[str]:
  """Sentences about the metrics of a step, each once: what was told is remembered in `told`."""
  found = {}
  for layer, zeros in enumerate(np.asarray(seen["zero_fraction_per_layer"])):
    if zeros == 1:
      found[f"zeros {layer}"] = f"layer {layer} is all zeros: its FFN does nothing; lower the penalty or the target."
  for name, what in (
    ("dead_neurons_per_layer", "neurons have not fired"),
    ("dead_experts_per_layer", "experts got no token"),
  ):
    for layer, number in enumerate(np.asarray(seen.get(name, ()))):
      if number:
        size = int(number).bit_length()  # told again when it has doubled
        found[f"{name} {layer} {size}"] = f"{number} {what} in {dead_after} steps, layer {layer}."
  new = [sentence for key, sentence in found.items() if key not in told]
  told.update(found)
  return new


def revive(
  params: Any, opt_state: Any, idle: Idle, tx: optax.GradientTransformation, dead_after: int, key: Array
) -> tuple[Any, Any, Idle]:
  """Parameters, optimizer state and counters with every dead neuron made anew."""
  masks = dead(idle, dead_after)
  reset = jax.tree.map(lambda _: False, params)
  for number, (kind, mask) in enumerate(masks.items()):
    ffn, new, marks = ffn_of(params, kind), {}, {}
    mask = mask.reshape(ffn["gate"].shape[:-2] + mask.shape[-1:])  # [L, F] or [L, E, F]
    for i, name in enumerate(("gate", "up")):
      noise = jax.random.normal(jax.random.fold_in(key, 2 * number + i), ffn[name].shape)
      norms = jnp.linalg.norm(ffn[name], axis=-2, keepdims=True)  # [..., 1, F]
      alive = ~mask[..., None, :]
      living = alive.sum(-1, keepdims=True)
      length = jnp.sum(norms, -1, keepdims=True, where=alive) / jnp.maximum(living, 1)
      length = jnp.where(living > 0, length, 1)  # of D entries of 1 / sqrt(D)
      new[name] = jnp.where(alive, ffn[name], length * noise / jnp.linalg.norm(noise, axis=-2, keepdims=True))
      marks[name] = ~alive
    new["down"], marks["down"] = jnp.where(mask[..., None], 0, ffn["down"]), mask[..., None]
    params, reset = with_ffn(params, kind, new), with_ffn(reset, kind, marks)

  def forgotten(moment: Any, reset: Any) -> Any:  # factors of lora have no rows of their own for a neuron
    return moment if isinstance(moment, Factors) else jnp.where(reset, 0, moment)

  opt_state = map_moments(tx, forgotten, opt_state, reset)
  idle = {kind: of | {"neurons": jnp.where(masks[kind], 0, of["neurons"])} for kind, of in idle.items()}
  return params, opt_state, idle
