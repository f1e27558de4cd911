"""Sparse upcycling: a dense model becomes a mixture of experts that computes the same (arXiv 2212.05055)."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.convert.leaf import Leaf
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig

EXPERTS_PER_TOKEN = 2  # as Mixtral
FFN = "layers/ffn/"


def upcycle(
  config: ModelConfig, leaves: Mapping[str, Leaf], experts: int, seed: int = 0
) -> tuple[ModelConfig, dict[str, Leaf]]:
  """A model of `experts` experts, each a copy of the dense FFN; its logits are those of the dense model.

  The weights of the chosen experts sum to 1 and the experts are equal, so the router, random here as it will have to
  learn, changes nothing yet.

  Args:
    config: of a dense model.
    leaves: its parameters.
    experts: E, at least 2.
    seed: of the router [L, D, E], normal with variance 1 / D, in the dtype of the FFN.

  Raises:
    UserError: the model has experts already, or there are fewer than 2 to be.
  """
  if config.num_experts:
    raise UserError(f"--upcycle: the model has {config.num_experts} experts already; only dense models are upcycled.")
  if experts < EXPERTS_PER_TOKEN:
    raise UserError(f"--upcycle={experts}: a token goes to {EXPERTS_PER_TOKEN} experts, so give at least as many.")
  ffn = {name: _copies(leaf, experts) for name, leaf in leaves.items() if name.startswith(FFN)}
  shape = (config.num_layers, config.d_model, experts)
  router = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * config.d_model**-0.5
  router = np.asarray(router).astype(ffn[f"{FFN}gate"].dtype)
  ffn[f"{FFN}router"] = Leaf(shape, router.dtype, 1, lambda index: router[index])
  moe = dataclasses.replace(config, num_experts=experts, experts_per_token=EXPERTS_PER_TOKEN)
  return moe, {**leaves, **ffn}


def _copies(leaf: Leaf, experts: int) -> Leaf:
  """[L, ...] -> [L, E, ...]; the layer that was read last is kept, for its other experts."""
  read = functools.lru_cache(maxsize=1)(leaf.at)
  return Leaf((leaf.shape[0], experts, *leaf.shape[1:]), leaf.dtype, 2, lambda index: read(index[:1]))
