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
  config.model.update({"num_experts": 4, "experts_per_token": 2})
  return config


WEIGHTS = {"z_loss": 0.0, "router_z_loss": 0.1, "router_balance_loss": 0.5}
JITTER = 0.1


def test_losses_and_noise_do_not_depend_on_the_mesh():
  config = moe(**WEIGHTS, router_jitter=JITTER)
  alone = train(config, steps=3)
  config.model.moe_impl = "ep_allgather"
  sharded = train(config, 8, 3, expert=2, fsdp=2, tensor=2)
  for name in ("loss", "router_z_loss", "router_balance_loss", "grad_norm"):
    np.testing.assert_allclose([m[name] for m in sharded], [m[name] for m in alone], rtol=1e-5)


@functools.cache
def model(remat="full"):
  config = dataclasses.replace(model_config(moe()), num_layers=3, dense_layers=1, dense_d_ff=32, remat=remat)
  return Transformer(config)


@functools.cache
def params():
  return jax.jit(lambda key: init_parameters(model(), key))(jax.random.key(0))


def with_keys(step=0):
  rows = batch(0)
  rows["segment_ids"][1::2, 4:] = 0  # so that one of two microbatches has fewer tokens
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), (8, 3))
  return rows | {"router_keys": keys}


def test_microbatches_change_neither_the_losses_of_routers_nor_their_noise():
  """The noise of a row goes with it to its microbatch; tests/train/test_microbatches.py has the gradients."""
  sums = jax.jit(lambda p, b: summed_gradients(p, b, model(), WEIGHTS, JITTER, 2, 1.0)[1])(params(), with_keys())
  whole = jax.jit(lambda p, b: summed_loss(p, b, model(), WEIGHTS, JITTER)[1])(params(), with_keys())
  assert float(sums.nll) == pytest.approx(float(whole.nll), rel=1e-5)
  for name in ("router_z_loss", "router_balance_loss"):
    assert float(sums.added[name]) == pytest.approx(float(whole.added[name]), rel=1e-5)
  np.testing.assert_array_equal(sums.counts["ffn"].routed, whole.counts["ffn"].routed)


@functools.cache
def gradients_of(remat="full"):
  """A function (batch, weights of [nll, router_z_loss, router_balance_loss]) -> gradient of their sum."""

  def loss(params, batch, weights):
    nll, _ = summed_loss(params, batch, model(remat), {}, JITTER)
    added = summed_loss(params, batch, model(remat), WEIGHTS, JITTER)[1].added
    return weights @ jnp.stack([nll, added["router_z_loss"], added["router_balance_loss"]])

  gradient = jax.jit(jax.grad(loss))
  return lambda batch, *weights: gradient(params(), batch, jnp.array(weights, jnp.float32))


def same(one, other):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), one, other)


def test_the_gradient_has_every_term():
  of = gradients_of()
  total = jax.jit(jax.grad(lambda p, b: summed_loss(p, b, model(), WEIGHTS, JITTER)[0]))(params(), with_keys())
  same(total, of(with_keys(), 1, 0.1, 0.5))
  for weights in np.eye(3):
    assert np.abs(of(with_keys(), *weights)["layers"]["ffn"]["router"]).max() > 1e-2


def test_noise_is_that_of_the_step_and_the_same_when_layers_are_computed_again():
  weights = 1, 0.1, 0.5
  again, kept = gradients_of("full")(with_keys(), *weights), gradients_of("none")(with_keys(), *weights)
  same(again, kept)
  router, other = (x["layers"]["ffn"]["router"] for x in (again, gradients_of()(with_keys(step=1), *weights)))
  assert np.abs(other - router).max() > 1e-2 * np.abs(router).max()


def test_noise_is_uniform_around_1_and_another_for_each_layer_and_row():
  jitter = Jitter(jax.random.split(jax.random.key(0), (2, 3)), 0.25)
  first, second = (Jitter(keys, 0.25)(jnp.ones((3, 50, 40))) for keys in jitter.keys)
  rows = np.concatenate([first, second]).reshape(6, -1)
  assert rows.min() >= 0.75 and rows.max() <= 1.25 and np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.1
  np.testing.assert_allclose(rows.mean(1), 1, atol=0.02)
  np.testing.assert_allclose(rows.std(1), 0.5 / 12**0.5, rtol=0.05)
  x, router = jnp.ones((3, 50, 40), jnp.bfloat16), jnp.eye(40)[:, :4]
  np.testing.assert_array_equal(router_logits(x, router, Jitter(jitter.keys[0], 0.25)), first[..., :4])
