"""The optimizers: what is decayed, the learning rate's course, and Muon against singular value decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.test_step import losses, small
from tsparse.check import check
from tsparse.errors import UserError
from tsparse.models.config import model_config
from tsparse.models.transformer import Transformer, init_parameters
from tsparse.train.optimizer import clipped, learning_rate, make_optimizer


def test_weight_decay_spares_the_norms():
  params = {"embed": jnp.ones((2, 2)), "final_norm": jnp.ones(2)}
  train = small(weight_decay=0.1, warmup_steps=0, learning_rate=0.5).train
  tx = make_optimizer(train, params)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert (updates["final_norm"] == 0).all()
  np.testing.assert_allclose(updates["embed"], -0.05)


@pytest.mark.parametrize("norm", [0.1, 5.0, 13.0, 100.0])  # of the gradients: 13
def test_gradients_are_clipped_as_optax_clips_them(norm):
  grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}
  actual, expected = (clip(norm).update(grads, optax.EmptyState())[0] for clip in (clipped, optax.clip_by_global_norm))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  jax.tree.map(np.testing.assert_array_equal, clipped(norm).update(zeros, optax.EmptyState())[0], zeros)


def test_learning_rate_warms_up_and_decays_to_its_final_value():
  train = small(steps=100, warmup_steps=10, learning_rate=1e-3, final_learning_rate_fraction=0.1).train
  rates = [float(learning_rate(train)(step)) for step in (0, 5, 10, 55, 100)]
  np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, 5.5e-4, 1e-4], rtol=1e-5)


def test_a_warm_up_that_is_longer_than_training_leaves_the_last_step():
  """Continuous in the steps: 51 and 50 of them warm up for 50 and 49."""
  for steps, warmup in ((1000, 50), (51, 50), (50, 49), (20, 19), (2, 1), (1, 0)):
    train = small(steps=steps, warmup_steps=50, learning_rate=1e-3, final_learning_rate_fraction=0.1).train
    rates = np.array([float(learning_rate(train)(step)) for step in range(steps + 1)])
    rising = np.arange(warmup + 1) / warmup if warmup else 1.0
    np.testing.assert_allclose(rates[: warmup + 1], 1e-3 * rising, rtol=1e-5)
    np.testing.assert_allclose(rates[steps], 1e-4, rtol=1e-5)


MATRICES = {  # of the parameters of the model below, by path: how the gradient of one matrix lies in them
  ("layers", "attention", "query"): lambda g: g.reshape(2, 32, -1),
  ("layers", "attention", "out"): lambda g: g.reshape(2, -1, 32),
  ("layers", "ffn", "gate"): lambda g: g.reshape(8, 32, 64),
  ("layers", "ffn", "down"): lambda g: g.reshape(8, 64, 32),
  ("layers", "ffn", "shared", "up"): lambda g: g,
}


def test_a_step_of_muon_has_the_singular_vectors_of_the_gradient_and_the_size_of_adamw_s():
  config = small(optimizer="muon", warmup_steps=0, learning_rate=0.5, weight_decay=0.0)
  config.model.update({"num_experts": 4, "experts_per_token": 2, "num_shared_experts": 1, "shared_d_ff": 16})
  config.model.shared_gate = True  # a vector in each layer, no matrix
  shapes = jax.eval_shape(lambda: init_parameters(Transformer(model_config(config)), jax.random.key(0)))
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  gradients = structure.unflatten([jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])
  params = jax.tree.map(jnp.zeros_like, gradients)
  tx = make_optimizer(config.train, shapes)
  updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(gradients, params)
  for path, lie in MATRICES.items():
    gradient, update = gradients, updates
    for name in path:
      gradient, update = gradient[name], update[name]
    for g, u in zip(lie(np.asarray(gradient)), lie(np.asarray(update)), strict=True):
      left, _, right = np.linalg.svd(g, full_matrices=False)
      turned = left.T @ (u / (-0.5 * 0.2 * max(g.shape) ** 0.5)) @ right.T
      np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=1e-3)
      assert ((np.diag(turned) > 0.3) & (np.diag(turned) < 1.4)).all()  # Newton-Schulz stops there
      np.testing.assert_allclose(np.sqrt(np.mean(u**2)), 0.5 * 0.2, rtol=0.3)
  for name in ("router", "shared_gate"):  # Adam's first step is the sign of the gradient
    size = np.abs(updates["layers"]["ffn"][name])
    np.testing.assert_allclose(size, size.max(), rtol=1e-3)


def test_losses_with_muon_do_not_depend_on_the_mesh():
  config = small(optimizer="muon")
  one = losses(config, steps=5)
  assert one[-1] < one[0]
  np.testing.assert_allclose(losses(config, 8, steps=5, data=2, fsdp=2, tensor=2), one, rtol=1e-5)


def test_an_unknown_optimizer_is_refused():
  with pytest.raises(UserError, match="'muom'.*adamw, muon"):
    check(small(optimizer="muom"))
