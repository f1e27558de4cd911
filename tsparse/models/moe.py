"""Mixture of experts after Mixtral (arXiv 2401.04088): router, and the dense oracle."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tsparse.models.counts import HiddenCounts, count_fired
from tsparse.models.ffn import Intervention, gated_hidden
from tsparse.sharding import constrain

Array = jax.Array


def route(x: Array, router: Array, experts_per_token: int, renormalize: bool = True) -> tuple[Array, Array]:
  """The experts of each token: weights [B, T, E] float32, 0 for those not chosen, and which are chosen, bool.

  In float32. A weight may underflow to 0; its expert is chosen all the same.

  Args:
    x: [B, T, D].
    router: [D, E] float32.
    experts_per_token: experts each token is sent to; ties go to the lower index.
    renormalize: softmax over the chosen logits (Mixtral), which equals the softmax over all renormalised to the chosen;
      if not, softmax over all, so that the weights of a token sum to less than 1 (OLMoE).
  """
  logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router)
  top, index = jax.lax.top_k(logits, experts_per_token)  # [B, T, k]
  one_hot = jax.nn.one_hot(index, router.shape[1], dtype=jnp.float32)  # [B, T, k, E]
  weights = jax.nn.softmax(top, axis=-1) if renormalize else jnp.exp(top - jax.nn.logsumexp(logits, -1, keepdims=True))
  return jnp.einsum("btk,btke->bte", weights, one_hot), one_hot.any(axis=2)


def moe_dense(
  x: Array,
  router: Array,
  gate: Array,
  up: Array,
  down: Array,
  valid: Array,
  activation: Callable[[Array, Array], Array],
  experts_per_token: int,
  renormalize: bool = True,
  predicted: Array | None = None,
  intervene: Intervention | None = None,
) -> tuple[Array, HiddenCounts]:
  """Every expert on every token, weighted by the router: E / experts_per_token times the work, and obviously right.

  Args:
    x: [B, T, D].
    router: [D, E] float32.
    gate: [E, D, F].
    up: [E, D, F].
    down: [E, F, D].
    valid: [B, T] bool, false on padding, which is computed but not counted.
    activation: (gate, up) -> hidden.
    experts_per_token: experts each token is sent to.
    renormalize: see `route`.
    predicted: optional mask [B, T, E, F] of the hidden (models/predictor.py).
    intervene: optional change of the hidden of each expert.

  Returns:
    [B, T, D], and counts over the tokens routed to each expert.
  """
  weights, chosen = route(x, router, experts_per_token, renormalize)
  weights = constrain(weights, "BTE")
  gate, up = jnp.einsum("btd,edf->btef", x, gate), jnp.einsum("btd,edf->btef", x, up)
  hidden = constrain(gated_hidden(gate, up, activation, predicted, intervene), "BTEF")  # [B, T, E, F]
  routed = chosen & valid[..., None]  # [B, T, E]
  counts = HiddenCounts(fired=count_fired(hidden, routed), routed=jnp.sum(routed, axis=(0, 1), dtype=jnp.float32))
  out = jnp.einsum("btef,efd->bted", hidden, down)  # [B, T, E, D]
  return jnp.einsum("bted,bte->btd", out, weights.astype(x.dtype)), counts
