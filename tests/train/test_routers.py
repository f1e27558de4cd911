"""What training adds for routers: their losses against numpy, their noise, and both on meshes and in microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_step import batch, small, train
from tsparse.models.config import model_config
from tsparse.models.router import Jitter, route, router_balance_loss, router_logits, router_sums, router_z_loss
from tsparse.models.transformer import Transformer, init_parameters
from tsparse.train.step import summed_gradients, summed_loss

L, E, K = 3, 5, 2


def test_both_losses_are_the_papers():
  """Token by token, in numpy; padding has other logits and does not count."""
  logits = np.random.default_rng(0).normal(size=(L, 4, 6, E)).astype(np.float32) * 2
  valid = np.arange(6) < np.array([6, 4, 0, 1])[:, None]
  z, balance = [], []
  for layer in logits:
    chosen = np.zeros(E)
    for token in layer[valid]:
      z.append(np.log(np.exp(token).sum()) ** 2)
      chosen[np.argsort(-token)[:K]] += 1
    probability = np.exp(layer[valid]) / np.exp(layer[valid]).sum(1, keepdims=True)
    balance.append(E * sum(chosen[e] / (11 * K) * probability[:, e].mean() for e in range(E)))
  sums = jax.vmap(lambda layer: router_sums(layer, valid))(logits)
  index = jax.vmap(lambda layer: route(layer, valid, K)[0])(logits)
  routed = (index[..., None] == jnp.arange(E)).sum((1, 2, 3))
  np.testing.assert_allclose(router_z_loss(sums, 11), np.mean(z), rtol=1e-5)
  np.testing.assert_allclose(router_balance_loss(sums, routed, 11), np.mean(balance), rtol=1e-5)


def test_a_balanced_router_has_a_balance_loss_of_1_and_one_that_knows_one_expert_of_E():
  everywhere, one = jnp.eye(E)[None] * 99, jnp.zeros((1, E, E)).at[..., 2].set(99)
  for logits, expected in ((everywhere, 1), (one, E)):
    valid = jnp.ones((1, E), bool)
    routed = jax.nn.one_hot(route(logits, valid, 1)[0], E).sum((0, 1, 2))
    sums = jax.tree.map(lambda x: x[None], router_sums(logits, valid))
    assert float(router_balance_loss(sums, routed[None], E)) == pytest.approx(expected)


def moe(**settings):
  config = small(**settings)
  config.model.update({"num_experts": 4, "experts_per_token": 2, "num_shared_experts": 1, "shared_d_ff": 16})
  config.model.update({"dense_layers": 1, "dense_d_ff": 32, "num_layers": 3})
  return config


ALL = {"router_z_loss": 0.1, "router_balance_loss": 0.5, "router_jitter": 0.1}
NAMES = "loss", "router_z_loss", "router_balance_loss", "grad_norm"


@functools.cache
def logged(devices=1, mesh=(), microbatches=1, **settings):
  config = moe(microbatches=microbatches, **settings)
  return [[float(metrics[name]) for name in NAMES] for metrics in train(config, devices, 4, **dict(mesh))]


@pytest.mark.parametrize(
  ("mesh", "impl"),
  [({"data": 8}, "ragged"), ({"expert": 2, "fsdp": 2, "tensor": 2}, "ep_allgather")],
  ids=["data", "eft"],
)
def test_losses_and_noise_do_not_depend_on_the_mesh(mesh, impl):
  config = moe(**ALL)
  config.model.moe_impl = impl
  sharded = [[metrics[name] for name in NAMES] for metrics in train(config, 8, 4, **mesh)]
  np.testing.assert_allclose(sharded, logged(**ALL), rtol=1e-5)


def test_without_the_balance_loss_microbatches_change_nothing():
  """The noise of a row goes with it to its microbatch."""
  settings = ALL | {"router_balance_loss": 0.0}
  np.testing.assert_allclose(logged(microbatches=4, **settings), logged(**settings), rtol=1e-5)


@functools.cache
def model(remat="full"):
  return Transformer(dataclasses.replace(model_config(moe()), remat=remat))


@functools.cache
def params():
  return jax.jit(lambda key: init_parameters(model(), key))(jax.random.key(0))


def test_the_balance_loss_of_microbatches_is_that_of_each():
  weights = {"z_loss": 0.0, "router_balance_loss": 1.0, "router_z_loss": 0.0}
  rows = batch(0)
  rows["segment_ids"][1::2, 4:] = 0  # so that one microbatch has fewer tokens
  _, sums = jax.jit(lambda p, b: summed_gradients(p, b, model(), weights, 0.0, 2))(params(), rows)
  alone = [
    summed_loss(params(), {name: x[i::2] for name, x in rows.items()}, model(), weights)[1].added for i in range(2)
  ]
  expected = sum(float(added["router_balance_loss"]) for added in alone)
  assert float(sums.added["router_balance_loss"]) == pytest.approx(expected, rel=1e-5)
  tokens = [(rows["segment_ids"][i::2] > 0).sum() for i in range(2)]
  assert all(float(added["router_balance_loss"]) / n >= 0.9 for added, n in zip(alone, tokens, strict=True))


def with_keys(step):
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), (8, 3))
  return batch(0) | {"router_keys": keys}


@functools.cache
def gradient(remat="full", router_z_loss=0.0, router_balance_loss=0.0, jitter=0.1, step=0):
  weights = {"z_loss": 0.0, "router_z_loss": router_z_loss, "router_balance_loss": router_balance_loss}
  of = jax.grad(lambda p: summed_loss(p, with_keys(step), model(remat), weights, jitter)[0])
  return jax.tree.map(np.asarray, jax.jit(of)(params()))


def test_the_gradient_has_every_term():
  """It is linear in their weights, and each of them moves the routers."""
  plain, both = gradient(), gradient(router_z_loss=0.3, router_balance_loss=0.7)
  z, balance = gradient(router_z_loss=1.0), gradient(router_balance_loss=1.0)
  for of in (z, balance):
    assert np.abs(of["layers"]["ffn"]["router"] - plain["layers"]["ffn"]["router"]).max() > 1e-2
  combined = jax.tree.map(lambda p, z, b: p + 0.3 * (z - p) + 0.7 * (b - p), plain, z, balance)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), combined, both)


def test_noise_is_that_of_the_step_and_the_same_when_layers_are_computed_again():
  again, kept = gradient("full"), gradient("none")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), again, kept)
  router = again["layers"]["ffn"]["router"]
  for other in (gradient(step=1), gradient(jitter=0.0)):
    assert np.abs(other["layers"]["ffn"]["router"] - router).max() > 1e-2 * np.abs(router).max()


def test_noise_is_uniform_around_1_and_another_for_each_layer_and_row():
  jitter = Jitter(jax.random.split(jax.random.key(0), (2, 3)), 0.25)
  first, second = (Jitter(keys, 0.25)(jnp.ones((3, 50, 40))) for keys in jitter.keys)
  rows = np.concatenate([first, second]).reshape(6, -1)
  assert rows.min() >= 0.75 and rows.max() <= 1.25 and np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.1
  np.testing.assert_allclose(rows.mean(1), 1, atol=0.02)
  np.testing.assert_allclose(rows.std(1), 0.5 / 12**0.5, rtol=0.05)
  x, router = jnp.ones((3, 50, 40), jnp.bfloat16), jnp.eye(40)[:, :4]
  np.testing.assert_array_equal(router_logits(x, router, Jitter(jitter.keys[0], 0.25)), first[..., :4])
