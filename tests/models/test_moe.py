"""Every implementation of the experts against the dense one: outputs, counts and gradients, on 1 and 8 devices."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import ragged
from tsparse import sharding
from tsparse.activations import activation
from tsparse.analysis.masks import TopK
from tsparse.errors import UserError
from tsparse.models.config import PRESETS
from tsparse.models.moe import IMPLEMENTATIONS, Experts, Predictors, moe
from tsparse.models.router import router_logits
from tsparse.models.transformer import Transformer, init_parameters

ragged.install()  # without it ep_ragged_a2a cannot run here
FAST = [impl for impl in IMPLEMENTATIONS if impl != "dense"]
ROWS, TIME, D, F, E, R = 6, 10, 16, 24, 4, 5  # 6 rows do not divide over 8 devices
MESHES = {
  "1 device": {},
  "experts and data": {"expert": 4, "data": 2},
  "experts, fsdp and tensor": {"expert": 2, "fsdp": 2, "tensor": 2},
}
# Added to the logits of the experts: which of them the tokens go to.
LOADS = {"balanced": (0, 0, 0, 0), "skewed": (0, 9, 0, 0), "empty": (-15, 15, 15, -15)}


def on(sizes):
  """The context of a mesh of 8 devices, or of none when `sizes` is empty."""
  if not sizes:
    return contextlib.nullcontext()
  return jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | sizes))


def near(actual, expected):
  scale = np.abs(expected).max(initial=1e-30)
  np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


VALID = np.arange(TIME) < np.array([10, 10, 7, 1, 0, 10])[:, None]


@functools.cache
def compiled(impl, mesh, masked):
  """For this mesh, a jitted function of what `layer` makes, one for all loads."""
  norm = jnp.exp(3 * jax.random.normal(jax.random.key(1), (E, F)))  # of each expert its own
  intervene = TopK(jnp.float32(0.9), norm, "contribution") if masked else None

  def outputs(x, router, experts, predictors):
    logits = router_logits(x, router)
    out, counts = moe(
      impl, x, logits, experts, VALID, activation("drelu"), 2, True, predictors, intervene, by_token=masked
    )
    return jnp.sum(out * jnp.cos(jnp.arange(D))), (out, counts)

  return jax.jit(jax.value_and_grad(outputs, argnums=(0, 1, 2, 3), has_aux=True))


@functools.cache
def layer(impl, mesh, load, predicted=False, masked=False):
  """Output, counts and gradients of a layer whose tokens go to its experts as `load` says."""
  keys = iter(jax.random.split(jax.random.key(0), 9))
  x = jax.random.normal(next(keys), (ROWS, TIME, D)).at[..., 0].set(1)
  router = jax.random.normal(next(keys), (D, E)).at[0].set(jnp.array(LOADS[load], jnp.float32))
  experts = Experts(*(jax.random.normal(next(keys), shape) for shape in ((E, D, F), (E, D, F), (E, F, D))))
  predictors = None
  if predicted:
    fc1, fc2 = jax.random.normal(next(keys), (E, D, R)), jax.random.normal(next(keys), (E, R, F))
    x_read, threshold = jax.random.normal(next(keys), (ROWS, TIME, D)), jnp.linspace(-1.0, 1.0, E)
    predictors = Predictors(fc1, fc2, x_read, threshold)
  with on(MESHES[mesh]):
    (_, aux), gradients = compiled(impl, mesh, masked)(x, router, experts, predictors)
  return jax.tree.map(np.asarray, (*aux, gradients))


def same(one, other):
  (out, counts, gradients), (expected, expected_counts, expected_gradients) = one, other
  near(out, expected)
  jax.tree.map(np.testing.assert_array_equal, counts, expected_counts)
  jax.tree.map(near, gradients, expected_gradients)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", FAST)
def test_a_layer_equals_the_oracle(impl, mesh, load):
  oracle = layer("dense", "1 device", load)
  same(layer(impl, mesh, load), oracle)
  assert (oracle[1].routed == 0).sum() == {"balanced": 0, "skewed": 0, "empty": 2}[load]
  assert oracle[1].routed.sum() == 38 * 2 and not oracle[0][4].any()  # padding goes nowhere


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", FAST)
def test_predictors_and_masks_are_those_of_the_oracle(impl, mesh):
  """With the neurons split over devices, a mask that keeps the largest of a token still sees all of them."""
  oracle = layer("dense", "1 device", "balanced", predicted=True, masked=True)
  same(layer(impl, mesh, "balanced", predicted=True, masked=True), oracle)
  assert 0 < oracle[1].fired.sum() < layer("dense", "1 device", "balanced")[1].fired.sum()


MODEL = dataclasses.replace(
  PRESETS["tiny_moe"], num_layers=3, d_model=32, d_ff=24, head_dim=8, activation="drelu", num_shared_experts=2,
  shared_d_ff=12, shared_gate=True, dense_layers=1, dense_d_ff=40,
)  # fmt: skip


@functools.cache
def logits_and_gradients(impl, mesh):
  model = Transformer(dataclasses.replace(MODEL, moe_impl=impl))
  params = jax.jit(lambda key: init_parameters(model, key))(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, MODEL.vocab_size)
  segments = (jnp.arange(12) < 9).astype(jnp.int32) * jnp.ones((8, 1), jnp.int32)
  positions = jnp.arange(12) * segments

  def outputs(params):
    logits, counts = model.apply({"params": params}, tokens, segments, positions)
    return jnp.sum(jnp.square(logits), where=segments[..., None] > 0), (logits, counts)

  with on(MESHES[mesh]):
    (_, aux), gradients = jax.jit(jax.value_and_grad(outputs, has_aux=True))(params)
  return jax.tree.map(np.asarray, (*aux, gradients))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", FAST)
def test_a_model_with_shared_experts_and_a_dense_layer_equals_the_oracle(impl, mesh):
  same(logits_and_gradients(impl, mesh), logits_and_gradients("dense", "1 device"))


def test_experts_that_do_not_divide_are_refused():
  experts = Experts(jnp.ones((3, D, F)), jnp.ones((3, D, F)), jnp.ones((3, F, D)))
  args = jnp.ones((8, 2, D)), jnp.ones((8, 2, 3)), experts, jnp.ones((8, 2), bool), activation("drelu"), 2
  with on(MESHES["experts and data"]):
    with pytest.raises(UserError, match="axis E has length 3, which does not divide over config.mesh expert=4"):
      jax.eval_shape(lambda: moe("ep_allgather", *args))
    jax.eval_shape(lambda: moe("ragged", *args))
