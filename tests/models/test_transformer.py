import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsparse.activations import activation
from tsparse.analysis.masks import TopK
from tsparse.models import counts, layers
from tsparse.models.config import PRESETS
from tsparse.models.loss import head_cross_entropy
from tsparse.models.moe import IMPLEMENTATIONS, Experts, moe
from tsparse.models.predictor import predict
from tsparse.models.router import route, router_logits
from tsparse.models.transformer import REMAT, Transformer, init_parameters
from tsparse.sharding import path_name

TINY = dataclasses.replace(PRESETS["tiny"], num_layers=2, d_model=64, d_ff=96, head_dim=16, activation="drelu")
GEMMA = dataclasses.replace(
  TINY,
  num_layers=3,
  sliding_window=4,
  full_attention_every=3,
  norm_offset=1.0,
  post_norms=True,
  scale_embeddings=True,
  attention_softcap=5.0,
  final_softcap=3.0,
)
MOE = dataclasses.replace(TINY, num_experts=4, experts_per_token=2)
DEEPSEEK = dataclasses.replace(MOE, num_shared_experts=2, shared_d_ff=24, dense_layers=1, dense_d_ff=160)


def row(*lengths, total):
  """Segment ids and positions [1, total] of a row packed with documents of the given lengths."""
  segments, positions = np.zeros((2, 1, total), np.int32)
  start = 0
  for i, length in enumerate(lengths):
    segments[0, start : start + length] = i + 1
    positions[0, start : start + length] = np.arange(length)
    start += length
  return jnp.asarray(segments), jnp.asarray(positions)


@functools.cache
def params_of(config):
  return jax.jit(lambda key: init_parameters(Transformer(config), key))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens, segment_ids, positions):
  return Transformer(config).apply({"params": params}, tokens, segment_ids, positions)


def tokens_of(length, seed=1):
  return jax.random.randint(jax.random.key(seed), (1, length), 0, TINY.vocab_size)


def test_parameter_names_are_those_of_the_documentation():
  def shapes(config):
    leaves = jax.tree_util.tree_leaves_with_path(params_of(config))
    return {path_name(path): leaf.shape for path, leaf in leaves}

  dense = shapes(TINY)
  assert dense["layers/ffn/gate"] == dense["layers/ffn/up"] == (2, 64, 96) and dense["layers/ffn/down"] == (2, 96, 64)
  assert dense["layers/attention/key"] == (2, 64, 2, 16) and dense["head"] == (64, 264)
  assert shapes(MOE)["layers/ffn/gate"] == (2, 4, 64, 96) and shapes(MOE)["layers/ffn/router"] == (2, 64, 4)
  assert shapes(GEMMA)["layers/attention_post_norm"] == shapes(GEMMA)["layers/ffn_post_norm"] == (3, 64)
  assert "head" not in shapes(dataclasses.replace(TINY, tie_embeddings=True))


@pytest.mark.parametrize("config", [TINY, MOE, GEMMA], ids=["dense", "moe", "gemma"])
def test_packed_documents_do_not_see_each_other(config):
  params = params_of(config)
  tokens = tokens_of(24)
  packed, _ = apply(config, params, tokens, *row(10, 14, total=24))
  for part in (slice(0, 10), slice(10, 24)):
    length = part.stop - part.start
    alone, _ = apply(config, params, tokens[:, part], *row(length, total=length))
    np.testing.assert_allclose(packed[:, part], alone, atol=1e-4)


def test_padding_is_not_counted():
  params = params_of(TINY)
  tokens = tokens_of(16)
  _, whole = apply(TINY, params, tokens, *row(9, total=16))
  _, alone = apply(TINY, params, tokens[:, :9], *row(9, total=9))
  jax.tree.map(np.testing.assert_array_equal, whole, alone)


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_drelu_at_random_parameters_zeroes_three_quarters(config):
  ffn = apply(config, params_of(config), tokens_of(256), *row(256, total=256))[1]["ffn"]
  zeros = 1 - ffn.fired.sum((1, 2)) / (ffn.routed.sum(1) * config.d_ff)
  np.testing.assert_allclose(zeros, 0.75, atol=0.04)
  assert ffn.routed.sum() == 256 * config.num_layers * max(1, config.experts_per_token)


@pytest.mark.parametrize("base", [TINY, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("remat", REMAT)
def test_recomputation_changes_no_gradient(remat, base):
  params, tokens, where = params_of(base), tokens_of(16), row(16, total=16)

  def gradient(config):
    return jax.jit(jax.grad(lambda p: apply(config, p, tokens, *where)[0].var()))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
    gradient(dataclasses.replace(base, remat=remat)),
    gradient(base),
  )


@pytest.mark.parametrize("config", [GEMMA, DEEPSEEK], ids=["gemma", "deepseek"])
def test_layers_in_one_turn_of_the_scan_give_the_same_numbers(config):
  segments, positions = row(7, 9, total=18)

  def loss(params, unroll):
    logits, counted = Transformer(config, unroll=unroll).apply({"params": params}, tokens_of(18), segments, positions)
    return jnp.sum(jnp.square(logits)), counted

  by_turns, at_once = (
    jax.jit(jax.value_and_grad(functools.partial(loss, unroll=unroll), has_aux=True))(params_of(config))
    for unroll in (False, True)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max()), by_turns, at_once)


def test_on_one_cpu_the_angles_are_computed_once():
  """XLA drops barriers there before it fuses, so that a cosine may be found in everything that reads it."""
  tokens, *where = (x.repeat(2, 0) for x in (tokens_of(18), *row(7, 9, total=18)))

  def loss(params):
    return jnp.sum(Transformer(TINY, unroll=True).apply({"params": params}, tokens, *where)[0])

  assert jax.jit(jax.grad(loss)).lower(params_of(TINY)).compile().as_text().count(" cosine(") == 1


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("remat", REMAT)
def test_on_a_tpu_nothing_but_the_angles_is_behind_a_barrier(remat, config):
  """A barrier in a layer makes its operands exist whole and keeps gathered weights apart: 5 GB a chip of Mixtral's."""
  model = Transformer(dataclasses.replace(config, remat=remat, moe_impl="ragged", dtype="bfloat16"))
  rows = [jnp.ones((1, 128), jnp.int32)] * 3

  def loss(params):
    return head_cross_entropy(model.apply({"params": params}, *rows, logits=False)[0], params["head"], rows[0])[0].sum()

  lowered = jax.jit(jax.grad(loss)).trace(params_of(config)).lower(lowering_platforms=("tpu",)).as_text()
  assert lowered.count("optimization_barrier") == 1


@pytest.mark.parametrize("config", [TINY, GEMMA], ids=["llama", "gemma"])
def test_bfloat16_compute_is_near_float32(config):
  params, tokens, where = params_of(config), tokens_of(32), row(32, total=32)
  exact, _ = apply(config, params, tokens, *where)
  rounded, _ = apply(dataclasses.replace(config, dtype="bfloat16"), params, tokens, *where)
  assert rounded.dtype == jnp.float32
  assert float(jnp.abs(rounded - exact).max()) < 0.1 * float(exact.std())


def test_a_norm_with_an_offset_multiplies_before_the_cast_and_one_without_after():
  x, scale = (jax.random.normal(jax.random.key(i), (7, 64)) for i in (0, 1))
  x, scale = np.asarray(x.astype(jnp.bfloat16)), np.asarray(scale[0])
  x32 = x.astype(np.float32)
  normed = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-3)
  product = (normed * (1 + scale)).astype(x.dtype)
  np.testing.assert_array_equal(layers.rms_norm(x, scale, 1e-3, offset=1.0), product)
  rounded = normed.astype(x.dtype) * scale.astype(x.dtype)
  np.testing.assert_array_equal(layers.rms_norm(x, scale, 1e-3), rounded)
  assert (normed.astype(x.dtype) * (1 + scale).astype(x.dtype) != product).any()  # the order is seen


def test_a_softcap_bends_large_values_to_the_cap():
  x = np.array([-1e4, -2.0, 0.0, 1e-3, 5.0], np.float32)
  np.testing.assert_allclose(layers.softcap(x, 3.0), 3 * np.tanh(x / 3), rtol=1e-6)
  np.testing.assert_array_equal(layers.softcap(x, 0.0), x)


def test_router_weights_are_a_softmax_over_the_chosen():
  x, router = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (8, 4))
  logits = np.asarray(x) @ np.asarray(router)
  expected = np.zeros_like(logits)
  for index in np.ndindex(2, 5):
    chosen = np.argsort(-logits[index])[:2]
    e = np.exp(logits[index][chosen] - logits[index].max())
    expected[index][chosen] = e / e.sum()
  valid = np.arange(5) < np.array([[5], [4]])
  chosen, weights = route(router_logits(x, router), valid, 2)
  spread = jnp.einsum("btk,btke->bte", weights, jax.nn.one_hot(chosen, 4))
  np.testing.assert_allclose(spread, expected * valid[..., None], atol=1e-5)
  np.testing.assert_array_equal(chosen[valid], np.argsort(-logits)[..., :2][valid])
  assert (chosen[~valid] == 4).all()
  chosen, underflown = route(jnp.array([[[500.0, 0, -500.0]]]), np.array([[True]]), 2)
  assert underflown[0, 0].tolist() == [1, 0] and chosen[0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_moe_equals_a_loop_over_tokens(impl):
  keys = jax.random.split(jax.random.key(0), 5)
  x, router, gate, up = (
    np.asarray(jax.random.normal(key, shape))
    for key, shape in zip(keys, [(1, 6, 8), (8, 4), (4, 8, 10), (4, 8, 10)], strict=False)
  )
  down = np.asarray(jax.random.normal(keys[4], (4, 10, 8)))
  valid = np.arange(6)[None] < 5
  out, ffn = moe(impl, x, router_logits(x, router), Experts(gate, up, down), valid, activation("drelu"), 2)
  chosen, weights = map(np.asarray, route(router_logits(x, router), valid, 2))
  fired = np.zeros((4, 10))
  for t in range(6):
    expected = 0
    for e, weight in zip(chosen[0, t], weights[0, t], strict=True):
      if not valid[0, t]:
        continue
      hidden = np.maximum(x[0, t] @ gate[e], 0) * np.maximum(x[0, t] @ up[e], 0)
      fired[e] += hidden != 0
      expected += weight * (hidden @ down[e])
    np.testing.assert_allclose(out[0, t], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(ffn.fired, fired)
  np.testing.assert_array_equal(ffn.routed, np.bincount(chosen[valid].ravel(), minlength=4))


def test_the_zeros_of_a_model_weigh_the_entries_of_all_its_ffns():
  tokens = tokens_of(64)
  _, by_kind = apply(DEEPSEEK, params_of(DEEPSEEK), tokens, *row(50, total=64))
  assert {kind: c.fired.shape for kind, c in by_kind.items()} == {
    "first": (1, 1, 160), "ffn": (1, 4, 96), "shared": (1, 1, 48)
  }  # fmt: skip
  fired = {kind: float(c.fired.sum()) for kind, c in by_kind.items()}
  first, others = fired["first"] / (50 * 160), (fired["ffn"] + fired["shared"]) / (50 * (2 * 96 + 48))
  np.testing.assert_allclose(counts.zero_fraction_per_layer(by_kind), [1 - first, 1 - others], rtol=1e-5)
  mean = 1 - sum(fired.values()) / (50 * (160 + 2 * 96 + 48))
  assert float(counts.model_zero_fraction(by_kind)) == pytest.approx(mean, rel=1e-5)


def test_an_intervention_reaches_the_layers_of_its_own_kind_by_their_own_levels():
  config = dataclasses.replace(DEEPSEEK, num_layers=3)
  params, tokens, where = params_of(config), tokens_of(16), row(16, total=16)
  fired = {}
  for kind, levels in (("first", [1.0]), ("ffn", [1.0, 0.0]), ("shared", [0.0, 1.0])):
    masked = Transformer(config).apply({"params": params}, tokens, *where, {kind: TopK(jnp.array(levels))})[1]
    fired[kind] = {name: (c.fired.sum((1, 2)) > 0).tolist() for name, c in masked.items()}
  assert fired["first"] == {"first": [False], "ffn": [True, True], "shared": [True, True]}
  assert fired["ffn"] == {"first": [True], "ffn": [False, True], "shared": [True, True]}
  assert fired["shared"] == {"first": [True], "ffn": [True, True], "shared": [True, False]}
  with pytest.raises(ValueError, match="this model has the FFNs"):
    Transformer(config).apply({"params": params}, tokens, *where, {"last": TopK(jnp.zeros(1))})


def test_the_gradient_of_a_predictor_is_straight_through():
  keys = jax.random.split(jax.random.key(0), 3)
  x, fc1, fc2 = (jax.random.normal(key, shape) for key, shape in zip(keys, [(1, 5, 8), (8, 3), (3, 10)], strict=True))
  mask = predict(x, fc1, fc2)
  soft = jax.nn.sigmoid(jax.nn.relu(x @ fc1) @ fc2)
  np.testing.assert_array_equal(mask, soft > 0.5)
  np.testing.assert_allclose(
    jax.grad(lambda w: (predict(x, fc1, w) ** 2).sum())(fc2),
    jax.grad(lambda w: (2 * mask * jax.nn.sigmoid(jax.nn.relu(x @ fc1) @ w)).sum())(fc2),
    rtol=1e-5,
  )
  per_expert = predict(x, jnp.stack([fc1, -fc1]), jnp.stack([fc2, fc2]))
  np.testing.assert_array_equal(per_expert[:, :, 0], mask)


def test_the_entropy_of_the_load_is_that_of_the_shares():
  routed = np.array([[8, 8, 8, 8], [0, 5, 0, 0], [0, 0, 0, 0], [3, 1, 0, 0]])
  entropy = counts.expert_load_entropy(counts.HiddenCounts(fired=np.zeros((4, 4, 2)), routed=routed))
  np.testing.assert_allclose(entropy, [np.log(4), 0, 0, 2 * np.log(2) - 0.75 * np.log(3)], atol=1e-6)
