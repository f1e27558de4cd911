"""Choosing the next token from logits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from tsparse.errors import UserError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; the order of the filters is that of transformers.

  Attributes:
    temperature: logits are divided by it; 0 takes the likeliest token, and nothing below matters.
    top_k: only so many likeliest tokens stay; 0 is all.
    top_p: of those the fewest likeliest whose probabilities sum to at least this (arXiv 1904.09751); 1 is all.
    min_p: of those the tokens at least this times as likely as the likeliest (arXiv 2407.01082); 0 is all.
    seed: of the draws. They depend on it, on the row and on how many tokens of the row were drawn, and on nothing else.

  Raises:
    UserError: a value is out of range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0

  def __post_init__(self):
    ranges = {
      "temperature": (0 <= self.temperature < math.inf, "a number from 0 on"),
      "top_k": (self.top_k >= 0, "a number from 0 on"),
      "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
      "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
    }
    for name, (holds, sentence) in ranges.items():
      if not holds:
        raise UserError(f"{name} is {getattr(self, name)}: it must be {sentence}.")


def filtered(sampling: Sampling, logits: Array) -> Array:
  """Logits [B, V] over the temperature, -inf where a filter takes a token away; at least one stays."""
  logits = logits / sampling.temperature
  if sampling.top_k:
    kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampling.top_p < 1:
    ranked = -jnp.sort(-logits, axis=-1)
    shares = jax.nn.softmax(ranked, axis=-1)
    stays = jnp.cumsum(shares, axis=-1) - shares < sampling.top_p  # those before it do not reach top_p yet
    least = jnp.min(ranked, axis=-1, keepdims=True, where=stays, initial=jnp.inf)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.min_p:
    logits = jnp.where(logits < logits.max(-1, keepdims=True) + math.log(sampling.min_p), -jnp.inf, logits)
  return logits


@functools.partial(jax.jit, static_argnums=0)
def choose(sampling: Sampling, logits: Array, step: Array, unused: Array | None = None) -> Array:
  """The next token of each row, [B] int32, from logits [B, V] but for the `unused`, bool [V]; `step` counts the tokens
  drawn before."""
  if unused is not None:
    logits = jnp.where(unused, -jnp.inf, logits)
  if not sampling.temperature:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  key = jax.random.fold_in(jax.random.key(sampling.seed), step)
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
  return jax.vmap(jax.random.categorical)(keys, filtered(sampling, logits)).astype(jnp.int32)
