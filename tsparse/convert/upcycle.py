"""Sparse upcycling: a dense model becomes a mixture of experts that computes the same (arXiv 2212.05055)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tsparse.errors import UserError
from tsparse.models.config import ModelConfig

EXPERTS_PER_TOKEN = 2  # as Mixtral


def upcycle(config: ModelConfig, params: Any, experts: int, seed: int = 0) -> tuple[ModelConfig, Any]:
  """A model of `experts` experts, each a copy of the dense FFN; its logits are those of the dense model.

  The weights of the chosen experts sum to 1 and the experts are equal, so the router, random here as it will have to
  learn, changes nothing yet.

  Args:
    config: of a dense model.
    params: its parameters.
    experts: E, at least 2.
    seed: of the router [L, D, E], normal with variance 1 / D.

  Raises:
    UserError: the model has experts already, or there are fewer than 2 to be.
  """
  if config.num_experts:
    raise UserError(f"--upcycle: the model has {config.num_experts} experts already; only dense models are upcycled.")
  if experts < EXPERTS_PER_TOKEN:
    raise UserError(f"--upcycle={experts}: a token goes to {EXPERTS_PER_TOKEN} experts, so give at least as many.")
  shape = (config.num_layers, config.d_model, experts)
  router = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * config.d_model**-0.5
  copies = {name: jnp.repeat(weight[:, None], experts, axis=1) for name, weight in params["layers"]["ffn"].items()}
  layers = {**params["layers"], "ffn": {**copies, "router": router}}
  moe = dataclasses.replace(config, num_experts=experts, experts_per_token=EXPERTS_PER_TOKEN)
  return moe, {**params, "layers": layers}
