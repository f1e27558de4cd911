"""Logits equal those of transformers on random weights in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.huggingface import parameters
from tsparse.models.config import ModelConfig
from tsparse.models.transformer import Transformer

LLAMA = ModelConfig(
  vocab_size=97,
  num_layers=2,
  d_model=32,
  d_ff=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_seq_len=64,
  dtype="float32",
  norm_eps=1e-6,
)
CASES = {
  "llama": LLAMA,
  "tied": dataclasses.replace(LLAMA, tie_embeddings=True, num_kv_heads=4, rope_theta=500.0),
  "mistral": dataclasses.replace(LLAMA, sliding_window=7),
  "mixtral": dataclasses.replace(LLAMA, num_experts=4, experts_per_token=2),
  "relu": dataclasses.replace(LLAMA, activation="relu"),
}


def huggingface_model(name, config):
  import torch
  import transformers

  family = {"mistral": "Mistral", "mixtral": "Mixtral"}.get(name, "Llama")
  extra = {"mistral": {"sliding_window": config.sliding_window}, "mixtral": {"num_local_experts": 4}}.get(name, {})
  torch.manual_seed(0)
  hf_config = getattr(transformers, f"{family}Config")(
    vocab_size=config.vocab_size,
    num_hidden_layers=config.num_layers,
    hidden_size=config.d_model,
    intermediate_size=config.d_ff,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    rms_norm_eps=config.norm_eps,
    rope_theta=config.rope_theta,
    tie_word_embeddings=config.tie_embeddings,
    hidden_act={"swiglu": "silu", "relu": "relu"}[config.activation],
    initializer_range=0.2,  # far from a trivial softmax
    attn_implementation="eager",
    **extra,
  )
  return getattr(transformers, f"{family}ForCausalLM")(hf_config).eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name):
  import torch

  config = CASES[name]
  reference = huggingface_model(name, config)
  params = parameters({key: value.detach().numpy() for key, value in reference.state_dict().items()}, config)
  for length in (1, 5, 40):  # 40 crosses the sliding window several times
    tokens = np.random.default_rng(length).integers(0, config.vocab_size, (2, length))
    with torch.no_grad():
      expected = reference(torch.tensor(tokens)).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    logits, _ = jax.jit(Transformer(config).apply)({"params": params}, tokens, jnp.ones_like(tokens), positions)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
