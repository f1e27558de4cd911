"""The blockwise cross-entropy against the plain one over whole logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsparse import sharding
from tsparse.models.config import PRESETS
from tsparse.models.layers import softcap
from tsparse.models.loss import cross_entropy, head_cross_entropy, scored, summed_cross_entropy
from tsparse.models.transformer import (
  Transformer,
  abstract_parameters,
  final_hidden,
  head_of,
  init_parameters,
  token_losses,
)

TINY = dataclasses.replace(PRESETS["tiny"], num_layers=2, d_model=32, d_ff=48, head_dim=8)
MESHES = {"one": (1, {}), "data": (8, {"data": 8}), "mixed": (8, {"data": 2, "fsdp": 2, "tensor": 2})}


def mesh_of(name):
  devices, sizes = MESHES[name]
  return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | sizes, jax.devices()[:devices])


def whole(hidden, head, targets, cap):
  return cross_entropy(softcap(jnp.einsum("btd,dv->btv", hidden, head), cap), targets)


def assert_close(actual, expected):
  """1e-5 of the largest entry of each array."""
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * np.abs(e).max()), actual, expected)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("time", [1, 5, 16, 83])
def test_losses_and_gradients_are_those_of_whole_logits(time, cap):
  keys = jax.random.split(jax.random.key(time), 4)
  hidden, head = jax.random.normal(keys[0], (3, time, 8)), jax.random.normal(keys[1], (8, 40))
  targets = jax.random.randint(keys[2], (3, time), 0, 40)
  weights = jax.random.normal(keys[3], (2, 3, time))  # of both outputs, in the scalar that is differentiated

  def scalar(hidden, head, function):
    losses = function(hidden, head, targets, cap)
    return sum(jnp.sum(w * x) for w, x in zip(weights, losses, strict=True)), losses

  gradient = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True), static_argnums=2)
  assert_close(gradient(hidden, head, head_cross_entropy), gradient(hidden, head, whole))


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("time", [1, 5, 16, 83])
def test_sums_and_their_gradient_are_those_of_the_counted_losses(time, cap):
  keys = jax.random.split(jax.random.key(time), 4)
  hidden, head = jax.random.normal(keys[0], (3, time, 8)), jax.random.normal(keys[1], (8, 40))
  targets, counted = jax.random.randint(keys[2], (3, time), 0, 40), jax.random.bernoulli(keys[3], 0.7, (3, time))

  def of_whole(hidden, head, z_weight):
    nll, log_z = whole(hidden, head, targets, cap)
    sums = jnp.sum(nll, where=counted), jnp.sum(log_z**2, where=counted)
    return sums[0] + z_weight * sums[1], sums

  def blockwise(hidden, head, z_weight):
    return summed_cross_entropy(hidden, head, targets, counted, z_weight, cap)

  for z_weight in (0.0, 0.1):
    args = hidden, head, z_weight
    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*args) for f in (blockwise, of_whole))
    assert_close(found, expected)
    assert_close(jax.jit(blockwise)(*args), expected[0])


def batch_and_weighed(losses):
  """A batch, and the gradient of a scalar of both outputs of `losses`(params, batch), beside the outputs."""
  tokens = jax.random.randint(jax.random.key(1), (8, 20), 0, TINY.vocab_size)
  positions = jnp.broadcast_to(jnp.arange(20), tokens.shape)
  batch = {"inputs": tokens, "targets": jnp.roll(tokens, -1, 1), "segment_ids": positions * 0 + 1}

  def scalar(params, batch):
    nll, log_z = losses(params, batch)
    return jnp.sum(nll) + 1e-2 * jnp.sum(log_z**2), (nll, log_z)

  return {**batch, "positions": positions}, jax.jit(jax.value_and_grad(scalar, has_aux=True))


@functools.cache
def oracle(model):
  """Parameters, and losses and gradients from whole logits on one device."""

  def losses(params, batch):
    rows = batch["inputs"], batch["segment_ids"], batch["positions"]
    return cross_entropy(model.apply({"params": params}, *rows)[0], batch["targets"])

  batch, gradient = batch_and_weighed(losses)
  params = jax.jit(lambda key: init_parameters(model, key))(jax.random.key(0))
  return params, jax.device_get(gradient(params, batch))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_model_has_the_losses_and_gradients_of_its_logits(mesh, tied):
  model, mesh = Transformer(dataclasses.replace(TINY, tie_embeddings=tied, final_softcap=3.0)), mesh_of(mesh)
  params, expected = oracle(model)
  batch, gradient = batch_and_weighed(lambda params, batch: token_losses(model, params, batch)[:2])
  params = jax.device_put(params, sharding.shardings(mesh, abstract_parameters(model)[1]))
  with jax.set_mesh(mesh):
    assert_close(jax.device_get(gradient(params, sharding.place(batch, mesh))), expected)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_model_has_the_sums_of_its_losses(mesh, tied):
  model, mesh = Transformer(dataclasses.replace(TINY, tie_embeddings=tied, final_softcap=3.0)), mesh_of(mesh)
  params, ((expected, (nll, log_z)), gradients) = oracle(model)
  batch, _ = batch_and_weighed(None)

  def loss(params, batch):
    hidden, _, _ = final_hidden(model, params, batch)
    return summed_cross_entropy(hidden, head_of(model, params), batch["targets"], scored(batch), 1e-2, 3.0)

  params = jax.device_put(params, sharding.shardings(mesh, abstract_parameters(model)[1]))
  with jax.set_mesh(mesh):
    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, sharding.place(batch, mesh))
  assert_close(jax.device_get(found), ((expected, (nll.sum(), (log_z**2).sum())), gradients))


@pytest.mark.parametrize("losses", ["each", "summed"])
def test_the_gradient_of_the_head_is_added_up_in_float32(losses):
  """In bfloat16 a sum over blocks would lose what each block adds."""
  hidden = jnp.full((1, 64, 1), 1.0, jnp.bfloat16).at[0, 8:].set(2**-6)
  head, targets = jnp.zeros((1, 2)), jnp.zeros((1, 64), jnp.int32)
  loss = {
    "each": lambda head: head_cross_entropy(hidden, head, targets)[0].sum(),
    "summed": lambda head: summed_cross_entropy(hidden, head, targets, targets == 0)[0],
  }[losses]
  gradient = jax.grad(loss)(head)
  np.testing.assert_allclose(gradient, [[-(8 + 56 / 64) / 2, (8 + 56 / 64) / 2]], rtol=1e-6)
