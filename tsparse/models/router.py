"""The router of a mixture of experts: the experts of each token, and what keeps the choice healthy in training."""

import jax
import jax.numpy as jnp
from flax import struct

from tsparse.sharding import constrain

Array = jax.Array


@struct.dataclass
class Jitter:
  """Multiplies what the router reads by noise, uniform in [1 - epsilon, 1 + epsilon] (Switch, arXiv 2101.03961, 2.4).

  One draw for each row, so that neither the mesh nor the microbatches change it.

  Attributes:
    keys: [B] random keys, one for each row of the batch; [L, B] for a stack of layers.
    epsilon: below 1.
  """

  keys: Array
  epsilon: float = struct.field(pytree_node=False)

  def __call__(self, x: Array) -> Array:
    """x [B, T, D] float32 -> the same shape."""
    bounds = 1 - self.epsilon, 1 + self.epsilon
    noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, *bounds))(self.keys)
    return x * constrain(noise, "BTD")


def router_logits(x: Array, router: Array, jitter: Jitter | None = None) -> Array:
  """[B, T, E] float32: x router, in float32, of x [B, T, D] (first disturbed if there is a jitter), router [D, E].

  Float32 on TPUs too, whose default for float32 operands is a pass in bfloat16: which experts are chosen depends on it.
  """
  x = x.astype(jnp.float32)
  return jnp.einsum("btd,de->bte", x if jitter is None else jitter(x), router, precision="highest")


def route(logits: Array, valid: Array, experts_per_token: int, renormalize: bool = True) -> tuple[Array, Array]:
  """The experts of each token, [B, T, k] int32, and their weights, [B, T, k] float32. Padding gets expert E, weight 0.

  A weight may underflow to 0; its expert is chosen all the same.

  Args:
    logits: [B, T, E] float32.
    valid: [B, T] bool, false on padding.
    experts_per_token: k, experts each token is sent to; ties go to the lower index.
    renormalize: softmax over the chosen logits (Mixtral), which equals the softmax over all renormalised to the chosen;
      if not, softmax over all, so that the weights of a token sum to less than 1 (OLMoE).
  """
  top, index = jax.lax.top_k(logits, experts_per_token)  # [B, T, k]
  weights = jax.nn.softmax(top, axis=-1) if renormalize else jnp.exp(top - jax.nn.logsumexp(logits, -1, keepdims=True))
  real = valid[..., None]
  return jnp.where(real, index, logits.shape[-1]), jnp.where(real, weights, 0)


@struct.dataclass
class RouterSums:
  """Sums over the real tokens that a layer's router has seen, or each layer's with a leading axis L.

  Attributes:
    log_z_squared: [...] float32, of logsumexp(logits)^2.
    probability: [..., E] float32, of softmax(logits).
  """

  log_z_squared: Array
  probability: Array


def router_sums(logits: Array, valid: Array) -> RouterSums:
  """The sums of logits [B, T, E] where valid [B, T]."""
  log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
  probability = jnp.where(valid[..., None], jax.nn.softmax(logits, axis=-1), 0)
  return RouterSums(jnp.sum(jnp.square(log_z), where=valid), probability.sum((0, 1)))


def router_z_loss(sums: RouterSums, tokens: Array) -> Array:
  """Mean over the tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

  Args:
    sums: of each layer, leading axis L.
    tokens: [] float32, how many they are sums over, or of a microbatch the real tokens of the whole batch; not 0.
  """
  return jnp.mean(sums.log_z_squared) / tokens


def router_balance_loss(sums: RouterSums, routed: Array, tokens: Array) -> Array:
  """Mean over the layers of  E sum_e f_e P_e  (Switch, arXiv 2101.03961, eq. 4): 1 when balanced, E when all go to one.

  f_e is the share of the token-choices of the batch that expert e got (it has no gradient), P_e the mean of its
  probability over all real tokens. Both are means over the whole batch, on all devices and of all microbatches: balance
  within each microbatch would keep experts from specialising (Demons in the Detail, arXiv 2501.11873).

  Args:
    sums: of each layer, leading axis L. The values of microbatches add up to that of the batch.
    routed: [L, E] float32, token-choices each expert got in the whole batch.
    tokens: [] float32, real tokens of the whole batch; not 0.
  """
  share = routed / jnp.maximum(routed.sum(-1, keepdims=True), 1)  # f
  return routed.shape[-1] * jnp.mean(jnp.sum(share * sums.probability / tokens, axis=-1))
