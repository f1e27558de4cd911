"""Rotary frequencies and their scalings, against those of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tsparse.errors import UserError
from tsparse.models.config import PRESETS
from tsparse.models.rope import SCALINGS, rotary_angles, rotary_frequencies

T = "original_max_position_embeddings"
CASES = {
  "linear": "linear:factor=2.5",
  "llama3.1": f"llama3:factor=8,low_freq_factor=1,high_freq_factor=4,{T}=8192",
  "llama3.2": f"llama3:factor=32,low_freq_factor=1,high_freq_factor=4,{T}=8192",
  "yarn": f"yarn:factor=4,{T}=32768",
  "yarn_whole_ramp": f"yarn:factor=40,{T}=4096,beta_fast=16,beta_slow=2,truncate=0",
  "yarn_mscale": f"yarn:factor=40,{T}=4096,mscale=1,mscale_all_dim=0.8",
  "yarn_mscale_alone": f"yarn:factor=40,{T}=4096,mscale=0.5",
  "yarn_attention_factor": f"yarn:factor=40,{T}=4096,attention_factor=1.5",
  "yarn_step": f"yarn:factor=4,{T}=6",  # the ramp has no length
}


def theirs(head_dim, theta, scaling):
  """Frequencies and factor by the functions of transformers."""
  import transformers
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  name, _, rest = scaling.partition(":")
  numbers = {key: float(value) for key, value in (item.split("=") for item in rest.split(","))}
  config = transformers.LlamaConfig(
    hidden_size=head_dim,
    num_attention_heads=1,
    max_position_embeddings=131_072,
    rope_parameters={"rope_type": name, "rope_theta": theta, **numbers},
  )
  frequencies, factor = ROPE_INIT_FUNCTIONS[name](config)
  return frequencies.numpy(), factor


def test_every_scaling_is_compared():
  assert {scaling.partition(":")[0] for scaling in CASES.values()} == set(SCALINGS)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500_000.0), (64, 10_000.0), (8, 1e6)])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case, head_dim, theta):
  expected, factor = theirs(head_dim, theta, CASES[case])
  frequencies, magnitude = rotary_frequencies(head_dim, theta, CASES[case])
  np.testing.assert_allclose(frequencies, expected, rtol=2e-7)  # one unit in the last place
  assert magnitude == pytest.approx(factor, rel=1e-12)
  plain, _ = rotary_frequencies(head_dim, theta)
  assert np.abs(np.asarray(frequencies) / np.asarray(plain) - 1).max() > 0.5  # the scaling does something


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500_000.0), (64, 10_000.0), (8, 1e6)])
def test_plain_frequencies_are_those_of_transformers_to_the_bit(head_dim, theta):
  import transformers
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  config = transformers.LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_theta=theta)
  expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
  np.testing.assert_array_equal(rotary_frequencies(head_dim, theta)[0], expected.numpy())
  assert factor == rotary_frequencies(head_dim, theta)[1] == 1


def test_angles_are_scaled_and_magnified():
  positions = jnp.array([[0, 7, 100]])
  cos, sin = rotary_angles(positions, 4, 100.0, f"yarn:factor=4,{T}=1000,attention_factor=2")
  frequencies, _ = rotary_frequencies(4, 100.0, f"yarn:factor=4,{T}=1000")
  angles = np.array([0, 7, 100])[None, :, None, None] * np.asarray(frequencies)
  np.testing.assert_allclose(cos, 2 * np.cos(angles), atol=1e-5)
  np.testing.assert_allclose(sin, 2 * np.sin(angles), atol=1e-5)


@pytest.mark.parametrize(
  ("scaling", "sentence"),
  [
    ("dynamic:factor=2", "'dynamic:factor=2' is unknown: choose one of linear:factor=...; llama3:"),
    ("linear", "'' should be NAME=NUMBER"),
    ("linear:factor", "'factor' should be NAME=NUMBER"),
    ("linear:factor=-2", "'factor=-2' should be"),
    ("linear:factor=nan", "'factor=nan' should be"),
    ("linear:factor=2,factor=3", "'factor=3' should be .* each once"),
    ("linear:factor=2,beta_fast=3", "'beta_fast=3' should be"),
    ("linear:factor=0.5", "factor is at least 1"),
    ("linear:factor=1e999", "all others are positive"),
    ("yarn:factor=2", f"lacks {T}"),
    (f"yarn:factor=2,{T}=0", "all others are positive"),
    (f"yarn:factor=2,{T}=10.5", "whole number"),
    (f"yarn:factor=2,{T}=10,beta_fast=1,beta_slow=1", "beta_fast is above beta_slow"),
    (f"yarn:factor=2,{T}=10,truncate=2", "truncate is 0 or 1"),
    (f"llama3:factor=2,{T}=10,low_freq_factor=4,high_freq_factor=4", "above low_freq_factor"),
  ],
)
def test_a_wrong_scaling_is_a_sentence(scaling, sentence):
  with pytest.raises(UserError, match=sentence):
    dataclasses.replace(PRESETS["tiny"], rope_scaling=scaling)


def test_a_scaling_needs_a_base_above_one():
  with pytest.raises(UserError, match="rope_theta is 1.0, rope_scaling needs it above 1"):
    dataclasses.replace(PRESETS["tiny"], rope_theta=1.0, rope_scaling=f"yarn:factor=2,{T}=10")
