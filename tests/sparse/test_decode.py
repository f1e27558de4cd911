"""Prefill and decoding with a cache against the Transformer on the whole row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_transformer import DEEPSEEK, GEMMA, MOE, TINY
from tsparse.analysis.masks import TopK
from tsparse.models.config import ffn_layers
from tsparse.models.transformer import Transformer, init_parameters
from tsparse.sparse.decode import by_layer, empty_cache, hidden_states, logits_of
from tsparse.sparse.kernels import native
from tsparse.sparse.layout import arrange, leaves_of

NATIVE = native.available()
CONFIGS = {
  "gemma": dataclasses.replace(GEMMA, tie_embeddings=True, activation="geglu_tanh", query_scalar=7),
  "olmoe": dataclasses.replace(
    MOE, qk_norm=True, attention_bias=True, router_renormalize=False, rope_scaling="linear:factor=2"
  ),
  "deepseek": dataclasses.replace(DEEPSEEK, shared_gate=True),
  "turbosparse": dataclasses.replace(TINY, sliding_window=5, predictor_ranks=(6, 6), predictor_input="before_norm"),
  "turbosparse_moe": dataclasses.replace(
    MOE, predictor_ranks=(6, 6), predictor_input="after_norm", predictor_thresholds=True
  ),
  "topk": dataclasses.replace(TINY, activation="topk:0.8"),
  "thresholds": dataclasses.replace(DEEPSEEK, hidden_thresholds=True),
}
LENGTH, PROMPT = 14, 8


@functools.cache
def model_of(config):
  """Parameters with no leaf left at zeros or ones, and the same as decoding reads them."""
  params = jax.jit(lambda key: init_parameters(Transformer(config), key))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
  params = jax.tree.unflatten(tree, noisy)
  if not config.predictor_ranks:
    return params, arrange(config, leaves_of(params))
  fc1 = params["layers"]["ffn"]["predictor"]["fc1"]  # the second layer's is of a lower rank: padded, and then not read
  params["layers"]["ffn"]["predictor"]["fc1"] = fc1.at[1, ..., 4:].set(0)
  arranged = arrange(dataclasses.replace(config, predictor_ranks=(6, 4)), leaves_of(params))
  assert [layer["fc1"].shape[1] for layer in arranged["layers"]] == [6, 4]
  return params, arranged


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def step(config, kernels, mode, params, cache, tokens, positions, valid):
  modes = (mode,) * config.num_layers
  hidden, cache, _ = hidden_states(config, kernels, modes, params, cache, tokens, positions, valid)
  return logits_of(config, kernels, params, hidden), cache


def decoded(config, kernels, mode, tokens, length):
  """Logits [B, LENGTH, V]: the prompts [B] of those lengths in one pass, padded, then a token at a time."""
  _, params = model_of(config)
  batch, prompt = len(tokens), max(length)
  cache = empty_cache(config, batch, LENGTH)
  at = np.broadcast_to(np.arange(prompt, dtype=np.int32), (batch, prompt))
  valid = at < np.array(length)[:, None]
  padded = np.where(valid, tokens[:, :prompt], 0)
  out = np.zeros((batch, LENGTH, config.vocab_size), np.float32)
  first, cache = step(config, kernels, mode, params, cache, padded, at, valid)
  out[:, :prompt] = np.where(valid[..., None], first, 0)
  for i in range(LENGTH - min(length)):
    at = np.minimum(np.array(length) + i, LENGTH - 1)[:, None].astype(np.int32)
    new, cache = step(
      config, kernels, mode, params, cache, np.take_along_axis(tokens, at, 1), at, np.ones((batch, 1), bool)
    )
    out[np.arange(batch), at[:, 0]] = new[:, 0]
  return out


CASES = [("reference", name) for name in CONFIGS if not NATIVE or name in ("gemma", "turbosparse_moe")]
CASES += [("native", name) for name in CONFIGS if NATIVE]


@pytest.mark.parametrize(("kernels", "name"), CASES)
def test_prefill_and_decoding_give_the_logits_of_the_whole_row(kernels, name):
  config = CONFIGS[name]
  tokens = np.array(jax.random.randint(jax.random.key(2), (2, LENGTH), 0, config.vocab_size))
  segments, at = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH), tokens.shape)
  want = jax.jit(Transformer(config).apply)({"params": model_of(config)[0]}, tokens, segments, at)[0]
  got = decoded(config, kernels, "off", tokens, (PROMPT, 3))
  assert float(jnp.std(want)) > 0.3
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_masks_of_each_kind_of_ffn_are_those_of_the_whole_model():
  config = CONFIGS["deepseek"]
  params, arranged = model_of(config)
  levels = zip(ffn_layers(config).items(), (0.85, 0.9, 0.95), strict=True)
  masks = {kind: TopK(jnp.full((layers,), level, jnp.float32)) for (kind, layers), level in levels}
  tokens = np.array(jax.random.randint(jax.random.key(2), (2, LENGTH), 0, config.vocab_size))
  segments, at = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  want = jax.jit(Transformer(config).apply)({"params": params}, tokens, segments, at, masks)[0]
  forward = functools.partial(hidden_states, config, CASES[-1][0], ("off",) * config.num_layers, arranged)
  inputs = empty_cache(config, 2, LENGTH), tokens, at, np.ones_like(tokens, bool)
  got, plain = (jax.jit(forward)(*inputs, by_layer(config, by))[0] for by in (masks, {}))
  np.testing.assert_allclose(logits_of(config, "reference", arranged, got), want, atol=1e-5)
  assert np.abs(got - plain).max() > 0.1


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@pytest.mark.parametrize(("mode", "name"), [("exact", "deepseek"), ("predictor", "turbosparse_moe")])
def test_skipping_zeros_changes_no_bit_of_the_logits(mode, name):
  config = CONFIGS[name]
  tokens = np.array(jax.random.randint(jax.random.key(2), (2, LENGTH), 0, config.vocab_size))
  sparse, dense = (decoded(config, "native", mode, tokens, (PROMPT, 3)) for mode in (mode, "off"))
  np.testing.assert_array_equal(sparse, dense)


def test_decoding_in_bfloat16_is_near_float32():
  config = CONFIGS["gemma"]  # without predictors or routers, whose decisions rounding turns over
  tokens = np.array(jax.random.randint(jax.random.key(2), (1, LENGTH), 0, config.vocab_size))
  exact = decoded(config, CASES[-1][0], "off", tokens, (PROMPT,))
  params, _ = model_of(config)
  narrow = dataclasses.replace(config, dtype="bfloat16")
  segments, at = np.ones_like(tokens), np.arange(LENGTH)[None]
  module = np.asarray(Transformer(narrow).apply({"params": params}, tokens, segments, at)[0])
  got = decoded(narrow, CASES[-1][0], "off", tokens, (PROMPT,))
  assert np.abs(got - exact).max() < 1.5 * np.abs(module - exact).max() < 0.2 * exact.std()
