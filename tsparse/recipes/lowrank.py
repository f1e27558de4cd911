"""LoRA (arXiv 2106.09685) as an optimizer: W = W_0 + A B, of which A and B are trained and the sum is what is stored.

A [L, m, R] starts as normal / sqrt(m), B [L, R, n] as 0, m the first axis of W after L and n all others. With G the
gradient of W those of A and B are G B^T and A^T G (the chain rule, exactly), the inner optimizer updates A and B, and W
by  A' B' - A B.  So the model, its checkpoints and its analysis know of nothing; its moments are those of A and B.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


# In float32 on TPUs too: W changes by the difference of two products, which differ by little.
matmul = functools.partial(jnp.matmul, precision="highest")


class Factors(NamedTuple):
  """A and B of a parameter."""

  a: Array
  b: Array


class LowRankState(NamedTuple):
  """Factors of each parameter and the state of the optimizer that trains them."""

  factors: Any
  inner: Any


def low_rank(inner: optax.GradientTransformation, rank: int, seed: int = 0) -> optax.GradientTransformation:
  """`inner` on factors of rank `rank` of parameters [L, m, ...]; A is drawn by the seed."""

  def start(number: int, w: Array) -> Factors:
    layers, m, *rest = w.shape
    a = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), (layers, m, rank)) * m**-0.5
    return Factors(a, jnp.zeros((layers, rank, math.prod(rest))))

  def product(factors: Factors, w: Array) -> Array:
    return matmul(*factors).reshape(w.shape)

  is_factors = lambda x: isinstance(x, Factors)  # noqa: E731

  def init(params: Any) -> LowRankState:
    leaves, structure = jax.tree.flatten(params)
    factors = structure.unflatten([start(number, w) for number, w in enumerate(leaves)])
    return LowRankState(factors, inner.init(factors))

  def update(gradients: Any, state: LowRankState, params: Any) -> tuple[Any, LowRankState]:
    del params

    def of_factors(factors: Factors, g: Array) -> Factors:
      g = g.reshape(*g.shape[:2], -1)
      return Factors(matmul(g, factors.b.swapaxes(1, 2)), matmul(factors.a.swapaxes(1, 2), g))

    inner_gradients = jax.tree.map(of_factors, state.factors, gradients, is_leaf=is_factors)
    updates, inner_state = inner.update(inner_gradients, state.inner, state.factors)
    factors = optax.apply_updates(state.factors, updates)
    change = jax.tree.map(
      lambda new, old, g: product(new, g) - product(old, g), factors, state.factors, gradients, is_leaf=is_factors
    )
    return change, LowRankState(factors, inner_state)

  return optax.GradientTransformation(init, update)
