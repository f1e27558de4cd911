"""What is promised in float32 is multiplied in float32 on TPUs too, whose default for float32 is passes in bfloat16."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from tsparse.activations import activation
from tsparse.analysis.probe import Seen
from tsparse.analysis.thresholds import cett
from tsparse.models.config import PRESETS
from tsparse.models.moe import Experts, moe
from tsparse.models.predictor import predict
from tsparse.models.router import router_logits
from tsparse.models.transformer import Transformer
from tsparse.recipes.hidden import Train
from tsparse.recipes.lowrank import low_rank
from tsparse.recipes.start import _one, refitted
from tsparse.sparse.predictors.fit import logits_of

B, T, D, F, E, R, K = 2, 3, 4, 6, 3, 2, 2
HALF = jnp.bfloat16


def f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def half(*shape):
  return jax.ShapeDtypeStruct(shape, HALF)


def with_gradient(function):
  return jax.value_and_grad(lambda *args: jnp.sum(function(*args)), (0, 1))


def prepared(x, gate, up, down):
  model = Transformer(dataclasses.replace(PRESETS["tiny"], d_model=D, d_ff=F))
  steps = ("signs", "norms", "thresholds", "refit")
  return _one(model, model, steps, 0.5, x, jnp.ones((B, T), bool), gate, up, down)


def errors(hidden, down, epsilon):
  seen = dict.fromkeys(Seen._fields) | {"hidden": hidden, "down": down, "reached": jnp.ones((B, T, E), bool)}
  return cett(Seen(**seen), epsilon)


def lora(gradient, w):
  tx = low_rank(optax.sgd(0.1), R)
  return tx.update(gradient, tx.init(w), w)[0]


def experts(impl, x, logits, gate, up, down):
  """Their penalty's gradient too; the products of the weights are in the compute dtype."""
  valid, act = jnp.ones((B, T), bool), activation("drelu")

  def run(x):
    out, counts = moe(impl, x, logits, Experts(gate, up, down), valid, act, K, True, None, Train(kind="l1"))
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(counts.penalty)

  return jax.value_and_grad(run)(x)


MOE = half(B, T, D), f32(B, T, E), half(E, D, F), half(E, D, F), half(E, F, D)
PROMISED = {
  "router": (with_gradient(router_logits), half(B, T, D), f32(D, E)),
  "start": (prepared, half(B, T, D), f32(D, F), f32(D, F), f32(F, D)),
  "refit": (refitted, f32(B, T, F), f32(B, T, D), f32(F, D)),
  "cett": (errors, half(B, T, E, F), half(E, F, D), f32(E, 2)),
  "low rank": (lora, f32(1, D, F), f32(1, D, F)),
  "dense experts": (functools.partial(experts, "dense"), *MOE),
  "grouped experts": (functools.partial(experts, "ragged"), *MOE),
  "predictor": (predict, f32(B, T, D), f32(D, R), f32(R, F)),
  "predictors": (with_gradient(logits_of), f32(B, T, D), f32(E, D, R), f32(E, R, F)),
}


@pytest.mark.parametrize("name", PROMISED)
def test_products_of_float32_ask_for_it(name):
  function, *args = PROMISED[name]
  text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
  products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  wide = [line for line in products if re.search(r": \(tensor<[\dx]*f32>, tensor<[\dx]*f32>\)", line)]
  assert wide and all("precision = [HIGHEST, HIGHEST]" in line for line in wide), "\n".join(wide)
