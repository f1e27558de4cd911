"""Recipes in the training step and loop: resumed, sharded, in microbatches, with a teacher; what is refused."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from configs import default
from tests.train.test_alive import HELD_OUT
from tests.train.test_step import batch
from tsparse import check, sharding
from tsparse import workdir as workdirs
from tsparse.errors import UserError
from tsparse.models.config import ffn_layers, model_config
from tsparse.models.loss import cross_entropy
from tsparse.models.transformer import Transformer, ffn_passes, init_parameters
from tsparse.recipes import guards, start, thresholds, trained
from tsparse.recipes.lowrank import Factors
from tsparse.recipes.recipe import plain, recipe_of
from tsparse.recipes.teacher import teacher_of
from tsparse.train import loop
from tsparse.train.loop import Source, compiled_step, initial_state, prepare
from tsparse.train.optimizer import make_optimizer


def small(text="stdlib", sparsity=(), train=(), **model):
  config = default.get_config()
  config.activation = "drelu"
  config.model.update({"num_layers": 2, "d_model": 16, "d_ff": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8})
  config.model.update({"remat": "none", **model})
  config.data.train = str(text)
  config.train.update({"steps": 8, "warmup_steps": 2, "seq_len": 16, "batch_size": 8, "checkpoint_every": 4})
  config.train.update({"log_every": 1, "eval_every": 100, "eval_batches": 1, **dict(train)})
  config.sparsity.update(dict(sparsity))
  return config


def source(config, seed=3):
  """A random SwiGLU model of the config's shape."""
  model = Transformer(dataclasses.replace(model_config(config), activation="swiglu", hidden_thresholds=False))

  return Source(lambda target: (jax.tree.map(jnp.copy, random_parameters(model, seed)), 0), model.config)


@functools.cache
def random_parameters(model, seed):
  return jax.jit(functools.partial(init_parameters, model))(jax.random.key(seed))


def one_device():
  return sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])


MOE = {"num_experts": 4, "experts_per_token": 2, "num_shared_experts": 1, "shared_d_ff": 16, "num_kv_heads": 2}
ALL = {
  "sparsity": {"target": 0.9, "per_layer": True, "penalty": "log", "start": "refit,signs", "swap_until": 0.25,
               "dead_after": 2, "revive_every": 3},
  "train": {"distill_weight": 0.6, "distill_top_k": 5, "match_until": 0.25, "microbatches": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.jsonl"
  path.write_text(
    "".join(json.dumps({"text": f"{i} bottles of beer on the wall, {i * i} green"}) + "\n" for i in range(200))
  )
  return path


def go(config, workdir):
  mesh, teacher, begins = one_device(), source(config), source(config)
  if config.model.hidden_thresholds:
    restore = thresholds.restored_with(begins.restore, begins.config, ffn_layers(model_config(config)), 0.0)
    begins = Source(restore, begins.config)
  with jax.set_mesh(mesh), workdirs.claim(workdir, config):
    loop.train(config, workdir, mesh, HELD_OUT, Console(quiet=True), "training", begins, None, teacher)
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if "seconds" not in k and "_per_second" not in k and "wait" not in k}
          for line in lines if "loss" in line]  # fmt: skip


def test_a_recipe_resumes_bit_for_bit_the_controller_included(text, tmp_path, monkeypatch):
  config = small(text, **ALL)
  config.train.optimizer = "muon"  # a part of the optimizer for the matrices, another for the rest: both are revived
  with jax.set_mesh(one_device()):
    program = compiled_step(prepare(config, one_device()), config)
  monkeypatch.setattr(loop, "compiled_step", lambda *_: program)  # compiled once
  whole = go(config, tmp_path / "whole")
  shutil.copytree(tmp_path / "whole", tmp_path / "torn")
  shutil.rmtree(tmp_path / "torn" / "checkpoints" / "8")
  assert go(config, tmp_path / "torn") == whole
  assert [line["swap_share"] for line in whole[:4]] == [0, 0.5, 1, 1]
  assert [line["matching"] > 0 for line in whole] == [True] * 2 + [False] * 6
  assert [line["distillation"] > 0 for line in whole] == [False] * 2 + [True] * 6
  weights = np.array([line["penalty_weight"] for line in whole])
  assert weights.shape == (8, 2) and (weights[:2] == 0).all() and np.allclose(weights[2:4], 1e-3)
  assert (weights[5:] > 1e-3).all() and weights[5, 0] != weights[5, 1]  # every layer's own
  assert all(line["zeros_wanted"][0] <= 0.9 for line in whole) and len(whole[-1]["dead_neurons_per_layer"]) == 2


@pytest.mark.parametrize("experts", [{}, MOE], ids=["dense", "experts"])
def test_thresholds_make_the_asked_share_from_the_first_step_to_the_last(text, tmp_path, experts):
  sparsity = {"target": 0.8, "moves": "thresholds", "start": "thresholds,refit"}
  train = {"distill_weight": 1.0, "learning_rate": 0.02}
  config = small(text, sparsity, train, hidden_thresholds=True, **experts)
  config.activation = "swiglu"
  zeros = [line["zero_fraction"] for line in go(config, tmp_path / "run")]
  np.testing.assert_allclose(zeros, 0.8, atol=0.05)
  config.sparsity.moves = "penalty"
  assert prepare(config, one_device()).recipe.controller and recipe_of(plain(config)).zeros == 0


@functools.cache
def compiled(model):
  return jax.jit(model.apply)


def out(model, params):
  """Logits of the real tokens of a batch."""
  one = batch(0)
  logits = compiled(model)({"params": params}, one["inputs"], one["segment_ids"], one["positions"])[0]
  return np.asarray(logits)[one["segment_ids"] > 0]


class Steps:
  """Two steps of a recipe with a teacher, a penalty, thresholds and a watch over dead neurons: one program."""

  def __init__(self):
    self.config = small(sparsity={"penalty_weight": 0.02, "threshold": 0.02, "dead_after": 2}, hidden_thresholds=True,
                        train={"distill_weight": 0.4, "distill_temperature": 2.0})  # fmt: skip
    self.run, begins = prepare(self.config, one_device()), source(self.config)
    self.own = begins.restore(None)[0]
    self.own["layers"]["ffn"]["up"] = self.own["layers"]["ffn"]["up"].at[1, :, 5].set(0)  # a neuron that never fires
    dead = lambda _: (jax.tree.map(jnp.copy, self.own), 0)  # noqa: E731
    restore = thresholds.restored_with(dead, begins.config, {"ffn": 2}, 0.02)
    self.params, _ = restore(self.run.target.params)
    state, _ = initial_state(self.run, 0, lambda _: (jax.tree.map(jnp.copy, self.params), 0))
    step = compiled_step(self.run, self.config)
    state, self.metrics = step(state, batch(0), self.own)
    self.state, self.last = step(state, batch(1), self.own)


@pytest.fixture(scope="module")
def steps():
  return Steps()


def test_the_terms_of_the_loss_are_their_definitions(steps):
  one, model, params, metrics = batch(0), steps.run.model, steps.params, steps.metrics
  real = one["segment_ids"] > 0
  student, teacher = out(model, params), out(steps.run.teacher.model, steps.own)
  q, p = (jax.nn.log_softmax(logits / 2.0) for logits in (student, teacher))
  nll, _ = cross_entropy(student, one["targets"][real])
  _, passes = jax.jit(functools.partial(ffn_passes, model))(params, one)
  weights, x = params["layers"]["ffn"], np.asarray(passes["layers"].x)[:, real]  # [L, tokens, D]
  hidden = np.maximum(x @ weights["gate"], 0) * np.maximum(x @ weights["up"], 0)
  hidden = np.where(hidden < 0.02, 0, hidden)
  np.testing.assert_allclose(metrics["loss"], nll.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["distillation"], 0.4 * 4 * np.sum(np.exp(p) * (p - q), -1).mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["sparsity_penalty"], 0.02 * hidden.sum((0, 2)).mean(), rtol=1e-4)


def test_thresholds_are_parameters_that_a_source_without_them_gets_and_that_learn(steps):
  assert steps.params["layers"]["ffn"]["threshold"].tolist() == [np.float32(0.02)] * 2
  assert jax.tree.structure(thresholds.without(steps.params)) == jax.tree.structure(steps.own)
  learned = np.asarray(steps.state.params["layers"]["ffn"]["threshold"])
  assert (learned != np.float32(0.02)).all() and steps.metrics["zero_fraction"] > 0.75


def test_what_the_rules_freeze_stays_and_is_shared_with_the_teacher():
  rules = r"embed|head=0; .*norm=0.5; layers/attention/.*=lora:2; (layers|first)/ffn/.*=1"
  config = small(train={"rules": rules, "distill_weight": 0.5})
  before = source(config).restore(None)[0]
  run = prepare(config, one_device())
  own = run.teacher.own(run.own)
  assert own["embed"] is None and own["layers"]["ffn"]["gate"] is not None
  moments = [x.shape for x in jax.tree.leaves(run.target.opt_state)]
  assert before["embed"].shape not in moments and (2, 16, 2) in moments  # none of the frozen, factors of rank 2
  state, _ = initial_state(run, 0, lambda _: (jax.tree.map(jnp.copy, before), 0))
  step = compiled_step(run, config)
  for i in range(2):  # the first has a learning rate of 0
    state, _ = step(state, batch(i), run.teacher.own(before))
  change = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, before)
  assert not change["embed"].any() and change["layers"]["ffn"]["down"].any() and change["final_norm"].any()
  query = change["layers"]["attention"]["query"].reshape(2, 16, -1)
  assert (np.linalg.matrix_rank(query, tol=1e-6) <= 2).all() and query.any()

  whole = trained.only_trained(
    optax.identity(), optax.sgd(1.0), trained.actions(trained.parse(".*norm=0.25;.*=1"), before)
  )
  updates, _ = whole.update(jax.tree.map(jnp.ones_like, before), whole.init(before), before)
  assert (updates["final_norm"] == -0.25).all() and (updates["embed"] == -1).all()


def test_the_factors_of_lora_are_drawn_by_the_seed_of_the_config():
  drawn = []
  for seed in (0, 0, 1):
    config = small(train={"rules": "layers/attention/query=lora:2; .*=1"})
    config.seed = seed
    run = prepare(config, one_device())
    state = run.tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape), run.target.params))
    drawn += [x.a for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Factors)) if isinstance(x, Factors)][
      :1
    ]
  np.testing.assert_array_equal(*drawn[:2])
  assert np.abs(np.corrcoef(*(np.ravel(x) for x in drawn[1:]))[0, 1]) < 0.5
  assert np.std(drawn[2]) == pytest.approx(16**-0.5, rel=0.2)


def test_turning_and_scaling_neurons_change_nothing_of_swiglu_and_refitting_helps_drelu():
  config = small(**MOE, moe_impl="dense", shared_gate=True)
  begins = source(config)
  old, new = Transformer(begins.config), Transformer(model_config(config))
  params, one = begins.restore(None)[0], batch(0)
  wanted, swapped = out(old, params), out(new, params)
  turned = start.start(old, new, jax.tree.map(jnp.copy, params), one, ("signs", "norms"))
  lengths = jnp.linalg.norm(turned["layers"]["ffn"]["down"], axis=-1)  # [L, E, F]
  np.testing.assert_allclose(lengths, jnp.broadcast_to(lengths[..., :1], lengths.shape), rtol=1e-4)
  np.testing.assert_allclose(out(old, turned), wanted, atol=2e-5)
  assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (turned, params)), strict=True))
  fitted = out(new, start.start(old, new, params, one, ("signs", "refit")))
  assert np.square(fitted - wanted).sum() < 0.5 * np.square(swapped - wanted).sum()


def test_dead_neurons_are_counted_and_revived_without_a_change(steps):
  run, state, metrics = steps.run, steps.state, steps.last
  dead = np.asarray(guards.dead(state.memory["idle"], 2)["ffn"])[:, 0]
  assert dead[1, 5] and metrics["dead_neurons_per_layer"].tolist() == dead.sum(1).tolist()
  told = set()
  assert any("layer 1" in sentence for sentence in guards.alarms(metrics, told, 2))
  assert guards.alarms(metrics, told, 2) == []
  assert "all zeros" in guards.alarms({"zero_fraction_per_layer": [0.5, 1.0]}, told, 2)[0]

  revived, opt_state, idle = guards.revive(
    state.params, state.opt_state, state.memory["idle"], run.tx, 2, jax.random.key(0)
  )
  np.testing.assert_array_equal(out(run.model, state.params), out(run.model, revived))
  ffn = revived["layers"]["ffn"]
  norms = np.linalg.norm(ffn["gate"][1], axis=0)
  assert norms[5] == pytest.approx(norms[~dead[1]].mean(), rel=1e-4) and not ffn["down"][1, 5].any()
  np.testing.assert_array_equal(ffn["gate"][1][:, ~dead[1]], state.params["layers"]["ffn"]["gate"][1][:, ~dead[1]])
  adam = next(s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
  assert (
    not adam.nu["layers"]["ffn"]["gate"][1, :, 5].any() and not np.asarray(idle["ffn"]["neurons"])[dead[:, None]].any()
  )

  ruled = small(train={"rules": "embed|head=0; layers/ffn/up|layers/attention/.*=lora:2; .*=1"}, hidden_thresholds=True)
  tx = make_optimizer(ruled.train, state.params)  # what is frozen has no moments, and factors of lora keep theirs
  before = tx.init(state.params)
  after = guards.revive(state.params, before, state.memory["idle"], tx, 2, jax.random.key(0))[1]
  jax.tree.map(np.testing.assert_array_equal, after, before)  # all moments are zero


def test_without_a_recipe_there_is_none():
  config = small(**ALL)
  assert recipe_of(config).on and not recipe_of(plain(config)).on and plain(config) == small(train={"microbatches": 2})
  run = prepare(plain(config), one_device())
  assert run.recipe is None and run.teacher is None and run.target.memory is None


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"sparsity.target": 1.0}, "config.sparsity.target is 1.0: it is a share of zeros, between 0 and 1"),
    ({"sparsity.target": -0.5}, "config.sparsity.target is -0.5"),
    ({"sparsity.target": 0.9, "activation": "swiglu"}, "config.activation swiglu, whose hidden is never made zero"),
    ({"sparsity.swap_until": 1.2}, "sparsity.swap_until is 1.2 and would end after training"),
    ({"sparsity.stages": "0:0,1.5:1e-3"}, "ends after training"),
    ({"sparsity.target": 0.9, "sparsity.stages": "0:1"}, "either a controller or a schedule"),
    ({"sparsity.target": 0.9, "sparsity.swap_until": 0.8}, "starts after swap_until"),
    ({"sparsity.swap_until": 0.5, "activation": "relu2"}, "the way from swiglu is to drelu or relu"),
    ({"sparsity.penalty": "l2"}, "choose of l1, log"),
    ({"sparsity.start": "sign"}, "choose of signs, norms, thresholds, refit"),
    ({"sparsity.start": "thresholds", "sparsity.target": 0.9}, "thresholds need config.model.hidden_thresholds"),
    ({"sparsity.moves": "thresholds", "sparsity.target": 0.9}, "that needs config.model.hidden_thresholds"),
    ({"sparsity.moves": "up"}, "unknown: penalty or thresholds"),
    ({"sparsity.threshold": 0.1}, "set config.model.hidden_thresholds"),
    ({"sparsity.revive_every": 5}, "say after how many steps"),
    ({"train.distill_weight": 1.5}, "between 0 and 1"),
    ({"train.distill_top_k": 9999}, "below the vocabulary"),
    ({"train.rules": "layers/fnn/.*=1; .*=0"}, "match no parameter"),
    ({"train.rules": "layers/.*=1"}, "matches none of the rules"),
    ({"train.rules": ".*=0"}, "nothing left to train"),
    ({"train.rules": ".*=lora:4"}, "give vectors and embed a number"),
    ({"train.rules": "(=1"}, "no regular expression"),
    ({"train.rules": ".*=fast"}, "not REGEX=ACTION"),
  ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(changes, sentence):
  config = small()
  for field, value in changes.items():
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
  with pytest.raises(UserError, match=sentence):
    check.check_step(config, one_device(), "cpu")


def test_a_recipe_without_its_start_or_with_a_teacher_of_other_tokens_is_refused(monkeypatch):
  config = small(train={"distill_weight": 0.5, "distill_teacher": "there"})
  other = dataclasses.replace(model_config(config), vocab_size=512)
  monkeypatch.setattr(check, "open_model", lambda path: types.SimpleNamespace(config=other, vocabulary="bytes"))
  for refused, sentence in (
    (config, "distill_teacher there has another vocabulary"),
    (small(train={"distill_weight": 0.5}), "there is no teacher: give a config.init"),
    (small(sparsity={"start": "signs"}), "there is no config.init to swap the activation of"),
  ):
    with pytest.raises(UserError, match=sentence):
      check.check_recipe(refused)


@pytest.mark.parametrize(
  ("sparsity", "train", "of_init", "refused"),
  [
    ({}, {}, False, True),
    ({"start": "norms"}, {}, None, True),
    ({"threshold": 0.02}, {}, False, False),
    ({"target": 0.8, "start": "thresholds"}, {}, None, False),
    ({"target": 0.8, "moves": "thresholds"}, {}, False, False),
    ({}, {"rules": ".*threshold=0; .*=1"}, False, False),
    ({}, {}, True, False),  # a phase of a model that has them
  ],
)
def test_thresholds_that_are_learned_do_not_start_at_0(sparsity, train, of_init, refused, monkeypatch):
  config = small(sparsity=sparsity, train=train, hidden_thresholds=True)
  begins = dataclasses.replace(model_config(config), activation="swiglu", hidden_thresholds=bool(of_init))
  monkeypatch.setattr(check, "open_model", lambda path: types.SimpleNamespace(config=begins, vocabulary="bytes"))
  config.init = "there" if of_init is not False else ""
  if not refused:
    return check.check_recipe(config)
  with pytest.raises(UserError, match="sparsity.threshold is 0.*no gradient.*--config.sparsity.threshold=0.02"):
    check.check_recipe(config)


def test_a_random_model_has_the_thresholds_of_its_config():
  config = small(sparsity={"threshold": 0.02}, hidden_thresholds=True, **MOE)
  run = prepare(config, one_device())
  ffn = initial_state(run, 0, None, threshold=config.sparsity.threshold)[0].params["layers"]["ffn"]
  np.testing.assert_array_equal([ffn["threshold"], ffn["shared"]["threshold"]], np.full((2, 2), np.float32(0.02)))


def test_a_teacher_of_another_shape_shares_nothing():
  config = small(train={"rules": "embed=0; .*=1"})
  shapes = prepare(config, one_device()).target.params
  model = model_config(config)
  assert teacher_of(model, model, "embed=0; .*=1", shapes, True).shared["embed"]
  assert teacher_of(dataclasses.replace(model, d_model=32), model, "embed=0; .*=1", shapes, False).shared is None
