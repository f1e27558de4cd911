"""The formulas of the recipes against numpy, with their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from configs import default
from tsparse.activations import activation
from tsparse.errors import UserError
from tsparse.models.counts import HiddenCounts, penalty_per_layer
from tsparse.models.ffn import gated_hidden
from tsparse.models.loss import BLOCKS
from tsparse.models.threshold import jump
from tsparse.models.transformer import REMAT
from tsparse.recipes import guards, penalties, swap, thresholds
from tsparse.recipes.controller import INTEGRAL, PROPORTIONAL, SMOOTHING, Controller
from tsparse.recipes.distill import Read, summed_distillation
from tsparse.recipes.lowrank import low_rank
from tsparse.recipes.start import RIDGE, energy, refitted, threshold
from tsparse.train.optimizer import make_optimizer

RNG = np.random.default_rng(0)
GATE, UP = RNG.normal(size=(2, 40, 30)).astype(np.float32)


def test_the_swap_goes_from_swiglu_to_exactly_drelu():
  moved = jax.jit(swap.to_drelu)
  for share in (0.0, 0.3, 1.0):
    silu = GATE * scipy.special.expit(GATE)
    wanted = ((1 - share) * silu + share * np.maximum(GATE, 0)) * np.where(UP > 0, UP, (1 - share) * UP)
    np.testing.assert_allclose(moved(GATE, UP, jnp.float32(share)), wanted, rtol=1e-5, atol=1e-6)
  assert moved._cache_size() == 1  # the share is traced
  for act, way in swap.WAYS.items():
    ends = way(GATE, UP, jnp.float32(0)), way(GATE, UP, jnp.float32(1))
    np.testing.assert_allclose(ends[0], activation("swiglu")(GATE, UP), rtol=1e-6)
    np.testing.assert_array_equal(ends[1], activation(act)(GATE, UP))
    gradients = [jax.grad(lambda g, u, f=f: f(g, u).sum(), (0, 1))(GATE, UP) for f in
                 (lambda g, u, way=way: way(g, u, jnp.float32(1)), activation(act))]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *gradients)
  assert [float(swap.share_at(jnp.int32(t), 4)) for t in (0, 1, 4, 9)] == [0, 0.25, 1, 1]


def test_penalties_and_their_gradients():
  hidden = np.append(GATE.ravel(), 0).astype(np.float32)
  sign, size = np.sign(hidden), np.abs(hidden)
  wanted = {
    "l1": (size, sign),
    "log": (0.2 * np.log(1 + size / 0.2), sign / (1 + size / 0.2)),
  }
  assert set(wanted) == set(penalties.PENALTIES)
  for kind, (value, slope) in wanted.items():
    penalty = lambda h, kind=kind: penalties.PENALTIES[kind](h, 0.2)  # noqa: E731
    np.testing.assert_allclose(penalty(hidden), value, rtol=1e-5, atol=1e-7)
    found = jax.grad(lambda h: penalty(h).sum())(hidden)  # noqa: B023
    np.testing.assert_allclose(np.where(hidden == 0, 0, found), slope, rtol=1e-5)


def test_the_penalty_of_a_layer_is_that_of_all_its_ffns():
  counts = {
    kind: HiddenCounts(fired=None, routed=None, penalty=jnp.array(penalty))
    for kind, penalty in {"ffn": [[1.0, 2], [3, 4]], "shared": [[10.0], [20]], "first": [[5.0]]}.items()
  }
  assert penalty_per_layer(counts).tolist() == [5, 13, 27]
  del counts["shared"], counts["first"]
  assert penalty_per_layer(counts).tolist() == [3, 7]


def test_the_staged_schedule_is_prosparses():
  stages = penalties.parse_stages("0.1:0.001, 0.5:0.02,1:0.01", 200)
  assert stages == ((20, 0.001), (100, 0.02), (200, 0.01))
  for step in (0, 20, 33, 60, 100, 150, 200, 500):
    wanted = 0.001
    for (a, low), (b, high) in zip(stages, stages[1:], strict=False):
      if step > a:
        t = min(step, b)
        wanted = low + 0.5 * (np.sin(-np.pi / 2 + np.pi * (t - a) / (b - a)) + 1) * (high - low)
    assert float(penalties.staged(jnp.int32(step), stages)) == pytest.approx(wanted, rel=1e-4)
  for text in ("0.5", "0.5:1,0.2:1", "0:1,1.5:1", "0:-1", "a:b"):
    with pytest.raises(UserError, match="config.sparsity.stages"):
      penalties.parse_stages(text, 200)


def test_the_controller_is_the_pi_controller_of_its_formula_and_brings_a_plant_to_its_target():
  controller = Controller(target=0.9, begin=10, by=410, weight=1e-3, groups=2)
  update = jax.jit(controller.update)
  state, kept = controller.init(), controller.init()
  state = update(state, jnp.array([0.6, 0.7]), 3)
  jax.tree.map(np.testing.assert_array_equal, state, kept)  # before it begins nothing moves

  def plant(lam, z):  # two layers that answer to lambda slowly and not alike
    return z + 0.03 * (np.clip([0.6 + 0.06 * np.log(lam[0] / 1e-3), 0.7 + 0.04 * np.log(lam[1] / 1e-3)], 0, 1) - z)

  z, mine = np.array([0.6, 0.7]), None
  for step in range(10, 610):
    state = update(state, jnp.asarray(z, jnp.float32), step)
    if mine is None:
      mine = {"log": np.log(1e-3), "z": z, "start": z, "e": 0.0}
    else:
      smooth = SMOOTHING * mine["z"] + (1 - SMOOTHING) * z
      setpoint = mine["start"] + min((step - 10) / 400, 1) * (0.9 - mine["start"])
      e = setpoint - smooth
      mine |= {
        "log": np.clip(mine["log"] + INTEGRAL / 400 * e + PROPORTIONAL * (e - mine["e"]), -14, 0),
        "z": smooth,
        "e": e,
      }
    if step < 30:
      np.testing.assert_allclose(state.log_weight, np.broadcast_to(mine["log"], 2), rtol=1e-4)
    z = plant(np.exp(np.asarray(state.log_weight)), z)
  np.testing.assert_allclose(z, 0.9, atol=0.01)


@pytest.fixture(scope="module")
def reads():
  rows, time, dim, other, vocab = 2, 2 * BLOCKS + 3, 6, 5, 40
  make = lambda *shape: RNG.normal(size=shape).astype(np.float32)  # noqa: E731
  student = Read(make(rows, time, dim), make(dim, vocab), 3.0)
  teacher = Read(make(rows, time, other), make(other, vocab))
  return student, teacher, RNG.integers(0, vocab, (rows, time)).astype(np.int32)


def test_distillation_is_that_of_the_whole_logits(reads):
  student, teacher, targets = reads
  counted = RNG.random(targets.shape) < 0.7
  weight, z_weight = 0.7, 1e-2

  def oracle(hidden, head, temperature, top_k):
    logits = 3.0 * jnp.tanh(jnp.einsum("btd,dv->btv", hidden, head) / 3.0)
    theirs = jnp.einsum("btd,dv->btv", teacher.hidden, teacher.head) / temperature
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    p, q = jax.nn.softmax(theirs), jax.nn.softmax(logits / temperature)
    if top_k:
      index = jnp.argsort(-p)[..., :top_k]
      p, q = (jnp.take_along_axis(x, index, -1) for x in (p, q))
      p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    by_token = nll, jax.nn.logsumexp(logits, axis=-1) ** 2, weight * temperature**2 * jnp.sum(p * jnp.log(p / q), -1)
    nll, z, kl = (x[counted].sum() for x in by_token)
    return (1 - weight) * nll + z_weight * z + kl, (nll, z, kl)

  def with_gradient(f):
    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(student.hidden, student.head)

  whole = None
  for temperature, top_k in ((2.0, 0), (2.0, 7)):
    options = {"temperature": temperature, "top_k": top_k}

    def ours(hidden, head, options=options):
      return summed_distillation(Read(hidden, head, 3.0), teacher, targets, counted, weight, z_weight, **options)

    (found, gradient), (wanted, theirs) = map(with_gradient, (ours, functools.partial(oracle, **options)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), found, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), gradient, theirs)
    assert whole is None or found[1][2] <= whole + 1e-5  # telling fewer tokens apart loses divergence
    whole = found[1][2]
  same = summed_distillation(teacher, teacher, targets, counted, weight)[1][2]
  np.testing.assert_allclose(same, 0, atol=1e-3)


def test_distillation_never_holds_the_logits_of_a_batch(reads):
  student, teacher, targets = reads

  def loss(hidden):
    return summed_distillation(student._replace(hidden=hidden), teacher, targets, targets >= 0, 0.7)[0]

  from tests.train.test_step import arrays

  program = jax.make_jaxpr(jax.grad(loss))(student.hidden)
  sizes = [aval.size for aval in arrays(program.jaxpr) if 40 in aval.shape and aval.ndim > 2]
  assert sizes and max(sizes) < targets.size * 40


def test_a_jump_has_the_gradient_of_its_window():
  theta = 0.5
  value, pull = jax.vjp(jump, GATE, jnp.float32(theta))
  kept = np.abs(GATE) >= theta
  np.testing.assert_array_equal(value, np.where(kept, GATE, 0))
  of_hidden, of_theta = pull(UP)
  np.testing.assert_array_equal(of_hidden, np.where(kept, UP, 0))
  window = (np.abs(GATE) > 0.25) & (np.abs(GATE) < 0.75)
  np.testing.assert_allclose(of_theta, -(np.sign(GATE) * UP)[window].sum(), rtol=1e-4)


def test_a_threshold_is_the_quantile_of_the_tokens_that_count():
  size, reached = np.abs(GATE).reshape(5, 8, 30), np.arange(40).reshape(5, 8) % 3 > 0
  theta = float(threshold(size, reached, 0.8))
  counted = size[reached]
  assert theta in counted and (counted < theta).mean() <= 0.8 < (counted <= theta).mean()
  assert threshold(size, np.zeros((5, 8), bool), 0.8) == 0


def test_a_learned_threshold_stays_where_it_has_a_gradient_and_a_frozen_one_stays():
  hidden = jnp.asarray(np.abs(GATE) * np.float32(0.01))
  params = {"layers": {"ffn": {"gate": jnp.ones((2, 3, 4)), "threshold": jnp.array([0.02, 0.0])}}}
  train = default.get_config().train
  train.update({"warmup_steps": 0, "learning_rate": 0.05, "steps": 1000})
  theta = lambda p: p["layers"]["ffn"]["threshold"]  # noqa: E731

  def after(steps, sign, params, tx, state):
    for _ in range(steps):
      grads = jax.grad(lambda p: sum(jnp.sum(jump(hidden, each)) for each in theta(p)) * sign)(params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  tx = make_optimizer(train, params)
  params_down, state = after(8, -1, params, tx, tx.init(params))  # zeros cost: both go down
  np.testing.assert_allclose(theta(params_down), thresholds.LEAST, rtol=1e-3)
  up, _ = after(20, 1, params_down, tx, state)
  assert (theta(up) > 10 * thresholds.LEAST).all()
  for rules, moved in ((".*threshold=0; .*=1", ""), ("", thresholds.PATHS)):
    train.rules = rules
    tx = make_optimizer(train, params, moved)
    np.testing.assert_array_equal(theta(after(2, -1, params, tx, tx.init(params))[0]), theta(params))


def test_thresholds_follow_the_zeros_of_the_model_or_of_each_layer():
  fired, routed = jnp.array([[[1.0, 0, 0, 0]], [[2.0, 2, 0, 0]]]), jnp.full((2, 1), 2.0)  # zeros 7/8 and 1/2
  params = {"layers": {"ffn": {"gate": 0, "threshold": jnp.array([0.5, 0.0])}}}
  for per_layer, zeros in ((False, [11 / 16] * 2), (True, [7 / 8, 1 / 2])):
    moved = thresholds.followed(params, {"ffn": HiddenCounts(fired, routed)}, 0.8, per_layer)["layers"]["ffn"]
    wanted = np.array([0.5, thresholds.LEAST]) * np.exp(thresholds.RATE * (0.8 - np.array(zeros)))
    np.testing.assert_allclose(moved["threshold"], wanted, rtol=1e-6)


def test_qsparse_keeps_the_largest_and_passes_every_gradient():
  act = activation("qsparse:0.8")
  squared = np.maximum(GATE, 0) ** 2 * UP
  order = np.argsort(-np.abs(squared), axis=-1, kind="stable")[:, :6]
  mask = np.zeros(GATE.shape, bool)
  np.put_along_axis(mask, order, True, axis=-1)
  np.testing.assert_allclose(act(GATE, UP), np.where(mask, squared, 0), rtol=1e-6)
  assert ((np.asarray(act(GATE, UP)) != 0).sum(-1) == 6).all()
  through = jax.grad(lambda g, u: act(g, u).sum(), (0, 1))(GATE, UP)
  np.testing.assert_allclose(through[0], 2 * np.maximum(GATE, 0) * UP, rtol=1e-5)
  np.testing.assert_allclose(through[1], np.maximum(GATE, 0) ** 2, rtol=1e-5)
  with pytest.raises(UserError, match="below 1"):
    activation("qsparse:1.5")


def test_topk_is_swiglu_in_its_largest_entries_and_nothing_elsewhere():
  act, dense = activation("topk:0.8"), activation("swiglu")
  hidden = np.asarray(dense(GATE, UP))
  mask = np.zeros(GATE.shape, bool)
  np.put_along_axis(mask, np.argsort(-np.abs(hidden), axis=-1, kind="stable")[:, :6], True, axis=-1)
  np.testing.assert_array_equal(act(GATE, UP), np.where(mask, hidden, 0))
  found, whole = (jax.grad(lambda g, u, f=f: f(g, u).sum(), (0, 1))(GATE, UP) for f in (act, dense))
  for ours, theirs in zip(found, whole, strict=True):
    np.testing.assert_allclose(ours, np.where(mask, theirs, 0), rtol=1e-5, atol=1e-7)


def test_the_backward_pass_does_not_look_for_the_largest_again():
  act = activation("topk:0.8")

  def loss(gate, up):
    return gated_hidden(gate, up, act, None, None).sum()

  def loops(function):
    return jax.jit(function).lower(GATE, UP).as_text().count("stablehlo.while")

  kept = jax.value_and_grad(jax.checkpoint(loss, policy=REMAT["dots"]))
  assert loops(loss) == loops(jax.value_and_grad(loss)) == loops(kept) > 0


def test_low_rank_training_is_that_of_the_two_factors():
  w = RNG.normal(size=(2, 6, 3, 4)).astype(np.float32)
  target = RNG.normal(size=w.shape).astype(np.float32)
  tx = low_rank(optax.sgd(0.05), 2)
  state, whole = tx.init(w), jnp.asarray(w)
  a, b = state.factors
  loss = lambda w: jnp.sum(jnp.square(w - target))  # noqa: E731
  merged = lambda a, b: w + (a @ b).reshape(w.shape)  # noqa: E731
  for _ in range(5):
    updates, state = tx.update(jax.grad(loss)(whole), state, whole)
    whole = optax.apply_updates(whole, updates)
    of_a, of_b = jax.grad(lambda a, b: loss(merged(a, b)), (0, 1))(a, b)
    a, b = a - 0.05 * of_a, b - 0.05 * of_b
  np.testing.assert_allclose(whole, merged(a, b), rtol=1e-4, atol=1e-5)
  change = np.asarray(whole - w).reshape(2, 6, 12)
  assert (np.linalg.matrix_rank(change, tol=1e-4) == 2).all()


def test_a_layer_or_an_expert_that_is_dead_as_a_whole_is_revived_at_the_size_of_a_new_one():
  d, f = 64, 6
  dead = np.zeros((2, 3, f), int)  # [L, E, F]
  dead[0], dead[1, 1, :2] = 9, 9  # a whole layer, and two neurons of an expert
  ffn = {name: jnp.asarray(RNG.normal(size=(2, 3, d, f)) * 3, jnp.float32) for name in ("gate", "up")}
  params = {"layers": {"ffn": ffn | {"down": jnp.ones((2, 3, f, d))}}}
  idle = {"ffn": {"neurons": jnp.asarray(dead), "experts": jnp.zeros((2, 3), jnp.int32)}}
  tx = optax.sgd(0.1)
  revived = guards.revive(params, tx.init(params), idle, tx, 5, jax.random.key(0))[0]["layers"]["ffn"]
  for name in ("gate", "up"):
    new, norms = np.asarray(revived[name]), np.linalg.norm(ffn[name], axis=-2)
    np.testing.assert_allclose(np.linalg.norm(new[0], axis=-2), 1, rtol=1e-5)
    assert new[0].std() == pytest.approx(d**-0.5, rel=0.05) and np.abs(new[0].mean()) < 0.1 * d**-0.5
    np.testing.assert_allclose(np.linalg.norm(new[1, 1, :, :2], axis=0), norms[1, 1, 2:].mean(), rtol=1e-5)
    np.testing.assert_array_equal(new[1, 1, :, 2:], ffn[name][1, 1, :, 2:])
  assert not revived["down"][0].any() and revived["down"][1, 0].all()


def test_refitting_solves_the_ridge_regression():
  hidden, y, down = RNG.normal(size=(3, 20, 8)), RNG.normal(size=(3, 20, 5)), np.ones((8, 5))
  h, flat = hidden.reshape(60, 8), y.reshape(60, 5)
  ridge = np.sqrt(RIDGE * (h**2).sum() / 8)
  wanted = np.linalg.lstsq(np.vstack([h, ridge * np.eye(8)]), np.vstack([flat, np.zeros((8, 5))]), rcond=None)[0]
  np.testing.assert_allclose(refitted(*map(jnp.float32, (hidden, y, down))), wanted, rtol=1e-3, atol=1e-5)
  np.testing.assert_array_equal(refitted(jnp.zeros((3, 20, 8)), jnp.float32(y), jnp.float32(down)), down)
  wanted = (np.maximum(GATE, 0) ** 2 * np.maximum(UP, 0) ** 2).sum(0)
  np.testing.assert_allclose(energy(GATE[None], UP[None]), wanted, rtol=1e-5)


def test_greedy_levels_are_the_best_of_all_where_costs_are_convex():
  costs = np.array([[0, 0.1, 0.3, 0.9], [0, 0.02, 0.05, 0.2], [0, 0.3, 0.8, 2.0]])
  zeros = np.repeat([[0.5, 0.7, 0.8, 0.9]], 3, 0) - [[0.0], [0.1], [0.0]]
  weights = np.array([0.3, 0.4, 0.3])
  for target in (0.4, 0.6, 0.75, 0.84):
    at = thresholds.greedy(costs, zeros, weights, target)
    rows = np.arange(3)
    every = [np.array(each) for each in np.ndindex(4, 4, 4) if weights @ zeros[rows, list(each)] >= target - 1e-9]
    assert weights @ zeros[rows, at] >= target - 1e-9
    best = min(costs[rows, each].sum() for each in every)
    assert costs[rows, at].sum() <= best + 0.11  # greedy may overshoot by its last step
  assert (thresholds.greedy(costs, zeros, weights, 0.99) == 3).all()
