"""Every term that a loss may have is that of the whole batch, in however many microbatches it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes.test_training import one_device, random_parameters, small
from tsparse import sharding
from tsparse.activations import activation
from tsparse.models.transformer import Transformer, ffn_passes
from tsparse.recipes.recipe import recipe_of
from tsparse.recipes.teacher import Teacher
from tsparse.train.step import Extra, summed_gradients

ROWS, TIME, E, K = 16, 10, 4, 2
WEIGHTS = {"z_loss": 0.1, "router_z_loss": 0.1, "router_balance_loss": 0.5}
TERMS = ("nll", *WEIGHTS, "sparsity_penalty", "distillation", "matching")
LAMBDA, DISTILL, TEMPERATURE, MATCHED = 0.02, 0.4, 2.0, 3  # matched until step 3


@functools.cache
def setting():
  """Student, teacher, their parameters, and a batch whose rows have very different numbers of tokens, some scored."""
  config = small(
    sparsity={"penalty_weight": LAMBDA},
    train={"steps": 10, "distill_weight": DISTILL, "distill_temperature": TEMPERATURE, "match_until": MATCHED / 10},
    num_experts=E, experts_per_token=K, vocab_size=32, dense_layers=1, dense_d_ff=24, num_layers=2,
  )  # fmt: skip
  recipe = recipe_of(config)
  student, teacher = (Transformer(dataclasses.replace(recipe.model, activation=a)) for a in ("drelu", "swiglu"))
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, TIME + 1, ROWS)
  real = np.arange(TIME) < lengths[:, None]
  scored = real & (rng.random((ROWS, TIME)) < rng.random((ROWS, 1)))
  scored[[0, 4]] = False  # rows 0, 4, 8 and 12 are a microbatch
  tokens = rng.integers(0, 32, (2, ROWS, TIME))
  positions = np.tile(np.arange(TIME), (ROWS, 1))
  names = "inputs", "targets", "segment_ids", "positions", "loss_mask"
  batch = {n: x.astype(np.int32) for n, x in zip(names, (*tokens, real, positions, scored), strict=True)}
  params = jax.device_get(random_parameters(student, 0))
  return recipe, student, teacher, params, jax.tree.map(lambda w: w[..., ::-1], params), batch


def found(mesh, microbatches, impl="dense"):
  """While matching and after it: (gradient, metrics) of the mean over the scored tokens."""
  recipe, student, teacher, params, own, batch = setting()
  student = Transformer(dataclasses.replace(student.config, moe_impl=impl))

  @jax.jit
  def at(params, own, batch, step):
    extra = Extra(recipe, Teacher(teacher), step, recipe.weights(step, None), own)
    scale = 1 / batch["loss_mask"].sum()
    grads, sums = summed_gradients(params, batch, student, WEIGHTS, 0.0, microbatches, scale, extra)
    return grads, {"nll": sums.nll * scale} | {name: x * scale for name, x in sums.added.items()}

  with jax.set_mesh(mesh):
    batch = sharding.place(batch, mesh)
    return [jax.device_get(at(params, own, batch, jnp.int32(step))) for step in (0, MATCHED)]


@functools.cache
def at_once():
  return found(one_device(), 1)


def same(one, other):
  for (grads, metrics), (wanted, of_wanted) in zip(one, other, strict=True):
    assert set(metrics) == set(of_wanted) == set(TERMS)
    for name in TERMS:
      np.testing.assert_allclose(metrics[name], of_wanted[name], rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3)), grads, wanted)


@pytest.mark.parametrize(
  ("microbatches", "mesh", "impl"),
  [
    (2, dict.fromkeys(sharding.MESH_AXES, 1), "dense"),
    (4, {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2}, "ep_allgather"),
  ],
  ids=["2 on one device", "4 on 8"],
)
def test_losses_and_gradients_do_not_depend_on_the_microbatches(microbatches, mesh, impl):
  mesh = sharding.make_mesh(mesh, jax.devices()[: int(np.prod([*mesh.values()]))])
  same(found(mesh, microbatches, impl), at_once())


def test_every_term_is_its_definition_over_the_whole_batch():
  """In numpy, from what the FFNs read and the logits."""
  recipe, student, teacher, params, own, batch = setting()
  real, scored = batch["segment_ids"] > 0, batch["loss_mask"] > 0
  inputs = batch["inputs"], batch["segment_ids"], batch["positions"]
  logits, theirs = (
    np.asarray(jax.jit(m.apply)({"params": p}, *inputs)[0])[scored] for m, p in ((student, params), (teacher, own))
  )
  log_q, log_p = (jax.nn.log_softmax(x / TEMPERATURE) for x in (logits, theirs))
  target = batch["targets"][scored]
  wanted = {
    "nll": -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(target)), target].mean(),
    "z_loss": np.square(jax.nn.logsumexp(logits, -1)).mean(),
    "distillation": DISTILL * TEMPERATURE**2 * np.sum(np.exp(log_p) * (log_p - log_q), -1).mean(),
  }

  def ffn(act, weights, x):
    """Of x [tokens, D]: its output, hidden [tokens, chosen, F], router logits and choices."""
    run = lambda w: np.asarray(activation(act)(x @ w["gate"], x @ w["up"]))  # noqa: E731
    if "router" not in weights:
      hidden = run(weights)
      return hidden @ weights["down"], hidden[:, None], None, None
    router = x @ weights["router"]
    index = np.argsort(-router, axis=-1)[:, :K]
    share = np.asarray(jax.nn.softmax(np.take_along_axis(router, index, -1)))
    of_expert = [{n: weights[n][e] for n in ("gate", "up", "down")} for e in range(E)]
    hidden = np.stack([run(w) for w in of_expert], 1)  # [tokens, E, F]
    outs = np.stack([hidden[:, e] @ w["down"] for e, w in enumerate(of_expert)], 1)
    rows = np.arange(len(x))[:, None]
    return np.einsum("nk,nkd->nd", share, outs[rows, index]), hidden[rows, index], router, index

  penalty = z = balance = matching = 0.0
  seen = jax.jit(ffn_passes, static_argnums=0)
  passes, of_teacher = (seen(m, p, batch)[1] for m, p in ((student, params), (teacher, own)))
  for stack, layers in (("first", 1), ("layers", 1)):
    for layer in range(layers):
      weights = jax.tree.map(lambda w, layer=layer: np.asarray(w[layer]), params[stack]["ffn"])
      _, hidden, router, index = ffn("drelu", weights, np.asarray(passes[stack].x[layer])[real])
      penalty += np.abs(hidden).sum() / real.sum()
      if router is not None:
        z += np.square(jax.nn.logsumexp(router, -1)).mean()
        f = (index[..., None] == np.arange(E)).mean((0, 1))
        balance += E * (f * np.asarray(jax.nn.softmax(router)).mean(0)).sum()
      aim = np.asarray(of_teacher[stack].out[layer])[real]
      out = ffn("drelu", weights, np.asarray(of_teacher[stack].x[layer])[real])[0]
      matching += np.square(out - aim).sum() / np.square(aim).sum() / 2
  wanted |= {"sparsity_penalty": LAMBDA * penalty, "router_z_loss": z, "router_balance_loss": balance}
  (_, before), (_, after) = at_once()
  for name, value in wanted.items():
    np.testing.assert_allclose(after[name], value, rtol=1e-4, err_msg=name)
  np.testing.assert_allclose(before["matching"], matching, rtol=1e-4)
  assert after["matching"] == 0 and before["sparsity_penalty"] == 0
