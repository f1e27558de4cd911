"""Neuron predictors, those inside the released TurboSparse models and ours: which entries of the hidden to compute."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def predict(x: Array, fc1: Array, fc2: Array, threshold: Array | None = None) -> Array:
  """Mask of the hidden, 1 where the predictor expects a non-zero entry: p > 1/2, p = sigmoid(relu(x fc1) fc2).

  The gradient is that of p (straight-through), as in the released models: m = p + stop_gradient(round(p) - p). Source:
  the modeling code of TurboSparse-Mixtral and a replica of TurboSparse-Mistral's.

  Args:
    x: [B, T, D].
    fc1: [D, R], or [E, D, R] with a predictor for each expert. Ranks differ between layers: shorter ones are padded
      with zeros, which changes nothing, since relu(0) = 0.
    fc2: [R, F], or [E, R, F].
    threshold: [] float32, or [E], which logits must exceed in place of 0: p is then that of logits - threshold.

  Returns:
    [B, T, F], or [B, T, E, F], in the dtype of x.
  """
  product = functools.partial(jnp.einsum, precision="highest")  # of float32, as decoding has it; the same in bfloat16
  if fc1.ndim == 2:
    logits = product("btr,rf->btf", jax.nn.relu(product("btd,dr->btr", x, fc1)), fc2)
  else:
    logits = product("bter,erf->btef", jax.nn.relu(product("btd,edr->bter", x, fc1)), fc2)
  return straight_through(logits, threshold)


def straight_through(logits: Array, threshold: Array | None = None) -> Array:
  """1 where p = sigmoid(logits - threshold) > 1/2 and 0 elsewhere, with the gradient of p.

  Args:
    logits: [..., F].
    threshold: [...] float32, None is 0. It has no gradient.
  """
  if threshold is not None:  # in float32: the sign of the difference is then that of the comparison
    shifted = logits.astype(jnp.float32) - jax.lax.stop_gradient(threshold)[..., None]
    logits = shifted.astype(logits.dtype)
  soft = jax.nn.sigmoid(logits)
  hard = (logits > 0).astype(logits.dtype)  # round(p), whose half rounds to 0
  return soft + jax.lax.stop_gradient(hard - soft)
