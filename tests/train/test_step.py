"""The training step on 8 virtual devices: same losses on every mesh, sharded moments, gradients added up."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import default
from tests import ragged
from tsparse import sharding
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import model_config
from tsparse.models.loss import BLOCKS
from tsparse.models.transformer import Transformer, token_losses
from tsparse.plan import compile_step
from tsparse.train.loop import UNROLLED, compiled_step, initial_state, prepare
from tsparse.train.optimizer import learning_rate, make_optimizer
from tsparse.train.step import TrainState, make_train_step, summed_loss

ragged.install()  # without it ep_ragged_a2a cannot run here


def small(activation="drelu", **train) -> ml_collections.ConfigDict:
  config = default.get_config()
  config.activation = activation
  config.model.update({"num_layers": 2, "d_model": 32, "d_ff": 64, "head_dim": 8})
  config.train.update(
    {
      "steps": 20,
      "warmup_steps": 3,
      "learning_rate": 1e-2,
      "final_learning_rate_fraction": 0.01,
      "seq_len": 16,
      "batch_size": 8,
      "z_loss": 1e-4,
      **train,
    }
  )
  return config


def batch(seed, rows=8, time=16):
  tokens = np.random.default_rng(seed).integers(0, 20, (rows, time + 1)).astype(np.int32)
  segments = np.repeat([[1] * 9 + [2] * (time - 12) + [0] * 3], rows, axis=0).astype(np.int32)
  positions = np.repeat([[*range(9), *range(time - 12), 0, 0, 0]], rows, axis=0).astype(np.int32)
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "positions": positions}


def train(config, devices=1, steps=20, **mesh_sizes):
  """The metrics of each step."""
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | mesh_sizes, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    run = prepare(config, mesh)
    state, _ = initial_state(run, config.seed, None)
    step = compiled_step(run, config)
    result = []
    for i in range(steps):
      state, metrics = step(state, sharding.place(batch(i), mesh))
      result.append({name: np.asarray(x) for name, x in metrics.items()})
  return result


def losses(*args, **mesh_sizes):
  return [metrics["loss"] for metrics in train(*args, **mesh_sizes)]


@functools.cache
def losses_on_one_device():
  return losses(small())


@pytest.mark.parametrize(
  "mesh",
  [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}],
  ids=["data", "fsdp", "df", "dft"],
)
def test_losses_do_not_depend_on_the_mesh(mesh):
  np.testing.assert_allclose(losses(small(), devices=8, **mesh), losses_on_one_device(), rtol=1e-5)


def small_moe(impl):
  config = small()
  config.model.update({"num_experts": 4, "experts_per_token": 2, "moe_impl": impl})
  config.model.update({"num_shared_experts": 1, "shared_d_ff": 16, "dense_layers": 1, "dense_d_ff": 32})
  return config


@functools.cache
def losses_of_a_moe(impl, devices=1, **mesh):
  config = small_moe(impl)
  config.sparsity.penalty_weight = 0.02  # the penalty of a recipe is summed over experts, neurons and rows
  return losses(config, devices, steps=20, **mesh)


@pytest.mark.parametrize(
  ("impl", "mesh"),
  [
    ("ragged", {}),
    ("ragged", {"data": 8}),
    ("ragged", {"data": 2, "fsdp": 4}),
    ("ragged", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("ragged", {"expert": 4, "fsdp": 2}),
    ("ragged", {"expert": 2, "fsdp": 2, "tensor": 2}),
    ("ep_allgather", {"expert": 4, "fsdp": 2}),
    ("ep_allgather", {"expert": 2, "fsdp": 2, "tensor": 2}),
    ("ep_ragged_a2a", {"expert": 2, "fsdp": 2, "tensor": 2}),
    ("dense", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("dense", {"expert": 4, "fsdp": 2}),
  ],
  ids=lambda value: value if isinstance(value, str) else "".join(f"{k[0]}{n}" for k, n in value.items()) or "1",
)
def test_losses_of_a_moe_do_not_depend_on_its_implementation_nor_on_the_mesh(impl, mesh):
  np.testing.assert_allclose(losses_of_a_moe(impl, 8 if mesh else 1, **mesh), losses_of_a_moe("dense"), rtol=1e-5)


COLLECTIVES = {  # by the version of JAX, whose XLA it is: that of Python 3.11 and that of 3.12
  "0.10": {
    "dense": {"all-gather": 46, "all-reduce": 55, "all-to-all": 2, "collective-permute": 1},
    "ep_allgather": {
      "all-gather": 65, "all-reduce": 61, "reduce-scatter": 3, "all-to-all": 2, "collective-permute": 1,
    },
  },
  "0.12": {
    "dense": {"all-gather": 47, "all-reduce": 55, "all-to-all": 1, "collective-permute": 1},
    "ep_allgather": {
      "all-gather": 66, "all-reduce": 56, "reduce-scatter": 3, "all-to-all": 1, "collective-permute": 1,
    },
  },
}[".".join(jax.__version__.split(".")[:2])]  # fmt: skip


@pytest.mark.parametrize("impl", COLLECTIVES)
def test_a_step_has_the_collectives_that_its_constraints_ask_for(impl):
  """Without any constraint the dense step has 32 all-gathers and 99 all-reduces, and moves twice the bytes.

  What one of them asks for is often implied by the others, and then its loss changes nothing here; each is counted in
  tests/test_sharding.py. Where a change is meant to move other arrays, or with another XLA, read what moved (the bytes
  of compile_step, the HLO) and set the figures to those of the failed assertion.
  """
  config = small() if impl == "dense" else small_moe(impl)
  sizes = {"fsdp": 4, "expert": 1} if impl == "dense" else {"fsdp": 2, "expert": 2}
  mesh = sharding.make_mesh({"data": 1, "tensor": 2} | sizes)
  counted = compile_step(config, mesh)["collectives"]
  assert {kind: sums["count"] for kind, sums in counted.items()} == COLLECTIVES[impl]


def test_losses_of_a_gemma_do_not_depend_on_the_mesh():
  config = small()
  config.model.update({"sliding_window": 5, "full_attention_every": 2, "norm_offset": 1.0, "post_norms": True})
  config.model.update({"scale_embeddings": True, "attention_softcap": 5.0, "final_softcap": 10.0})
  sharded = losses(config, 8, steps=5, data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(sharded, losses(config, steps=5), rtol=1e-5)


def test_microbatches_add_up_to_the_whole_batch():
  np.testing.assert_allclose(losses(small(microbatches=4)), losses_on_one_device(), rtol=1e-5)
  sharded = losses(small(microbatches=2), devices=4, data=2, fsdp=2)
  np.testing.assert_allclose(sharded, losses_on_one_device(), rtol=1e-5)


GOLDEN = (6.076366, 3.645945, 3.188565)


def test_losses_are_those_recorded():
  """Golden numbers: change them only with a change that is meant to change training, and say so in the commit."""
  np.testing.assert_allclose(np.asarray(losses_on_one_device())[[0, 9, 19]], GOLDEN, rtol=2e-4)


def arrays(jaxpr):
  """Every array that a program makes, loops and branches included."""
  for equation in jaxpr.eqns:
    yield from (var.aval for var in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        yield from arrays(inner)
      elif hasattr(inner, "jaxpr"):
        yield from arrays(inner.jaxpr)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_logits_of_a_batch_never_exist_at_once(microbatches):
  """One block of BLOCKS does, which shows that the search would find them."""
  config = small(microbatches=microbatches)
  rows, time, vocab = 8, 16, config.model.vocab_size
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
  run = prepare(config, mesh)
  row = jax.ShapeDtypeStruct((rows, time), jnp.int32)
  program = jax.make_jaxpr(compiled_step(run, config))(run.target, dict.fromkeys(batch(0), row))
  sizes = {aval.size for aval in arrays(program.jaxpr) if vocab in aval.shape and aval.dtype == jnp.float32}
  logits = rows // microbatches * time * vocab
  assert logits // BLOCKS in sizes and max(sizes - {vocab * config.model.d_model}) < logits


def test_layers_take_one_turn_of_the_scan_on_one_cpu_device_if_they_are_few():
  few, many = small(), small()
  many.model.num_layers = UNROLLED + 1
  one, eight = (sharding.make_mesh({"data": n, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:n]) for n in (1, 8))
  assert prepare(few, one).model.unroll
  assert not prepare(few, eight).model.unroll and not prepare(many, one).model.unroll


@pytest.mark.parametrize(("experts", "axes"), [(0, {"fsdp": 4, "expert": 1}), (4, {"fsdp": 2, "expert": 2})])
def test_moments_are_sharded_like_their_parameters_from_the_start(experts, axes):
  config = small()
  config.model.update({"num_experts": experts, "experts_per_token": min(2, experts)})
  mesh = sharding.make_mesh({"data": 1, "tensor": 2} | axes)
  with jax.set_mesh(mesh):
    run = prepare(config, mesh)
    state, _ = initial_state(run, 0, None)
  adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
  for moments in (adam.mu, adam.nu):
    jax.tree.map(lambda m, p: np.testing.assert_equal(m.sharding, p.sharding), moments, state.params)
  gate = state.params["layers"]["ffn"]["gate"]
  assert gate.addressable_shards[0].data.size == gate.size // 8


def test_padding_has_no_loss_and_no_gradient():
  model = Transformer(model_config(small()))
  params = jax.jit(model.init)(jax.random.key(0), *jnp.zeros((3, 1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda box: box.unbox(), params, is_leaf=lambda x: hasattr(x, "unbox"))
  one, other = batch(0), batch(0)
  other["targets"] = np.where(other["segment_ids"] > 0, other["targets"], 7)
  other["inputs"] = np.where(other["segment_ids"] > 0, other["inputs"], 9)
  gradient = jax.jit(jax.grad(lambda p, b: summed_loss(p, b, model, {"z_loss": 1e-4})[0]))
  jax.tree.map(np.testing.assert_array_equal, gradient(params, one), gradient(params, other))


def test_targets_that_are_not_scored_count_neither_in_the_loss_nor_in_its_gradient():
  config = small(z_loss=0.0)
  model = Transformer(model_config(config))
  params = jax.jit(model.init)(jax.random.key(0), *jnp.zeros((3, 1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda box: box.unbox(), params, is_leaf=lambda x: hasattr(x, "unbox"))
  plain = batch(0)
  mask = np.random.default_rng(1).integers(0, 2, plain["targets"].shape) * (plain["segment_ids"] > 0)
  masked = plain | {"loss_mask": mask.astype(np.int32)}
  other = masked | {"targets": np.where(mask, plain["targets"], 7).astype(np.int32)}
  gradient = jax.jit(jax.grad(lambda p, b: summed_loss(p, b, model, {"z_loss": 1e-4})[0]))
  jax.tree.map(np.testing.assert_array_equal, gradient(params, masked), gradient(params, other))

  nll = np.asarray(jax.jit(lambda p: token_losses(model, p, plain)[0])(params))
  tx = make_optimizer(config.train, params)
  options = {"weights": {"z_loss": 0.0}, "router_jitter": 0.0, "seed": 0, "microbatches": 2}
  step = jax.jit(make_train_step(model, tx, learning_rate(config.train), **options))
  state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))
  found, whole = step(state, masked)[1], step(state, plain | {"loss_mask": plain["segment_ids"]})[1]
  np.testing.assert_allclose(found["loss"], nll[mask > 0].mean(), rtol=1e-5)
  np.testing.assert_allclose(whole["loss"], nll[plain["segment_ids"] > 0].mean(), rtol=1e-5)
  assert found["tokens"] == whole["tokens"] and found["zero_fraction"] == whole["zero_fraction"]
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    evaluation = evaluate(model, params, [masked], mesh)
  assert evaluation.tokens == mask.sum()
  np.testing.assert_allclose(evaluation.loss, found["loss"], rtol=1e-5)
