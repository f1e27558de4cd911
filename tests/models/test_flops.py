"""Operations against numbers worked out by hand and against XLA's count of an unrolled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsparse.models.attention import tpu_share
from tsparse.models.config import PRESETS
from tsparse.models.flops import forward_flops, training_flops
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.native import library

TINY = dataclasses.replace(PRESETS["tiny"], num_layers=1, remat="none")


def test_mistral_is_six_operations_per_weight_and_attention_beside_it():
  """PaLM's 6 N + 12 L N H T per token; N is every weight but the embedding and the norms."""
  weights = 7_241_732_096 - 32_000 * 4096 - 65 * 4096
  expected = 6 * weights + 12 * 32 * 4096 * 4096
  assert training_flops(PRESETS["mistral_7b"], 1000, 4096, 0.9)["model"] == 1000 * expected


def test_only_the_experts_of_a_token_count_and_zeros_save_of_the_ffn_alone():
  dense, moe = PRESETS["mistral_7b"], PRESETS["mixtral_8x7b"]
  assert forward_flops(moe, 4096)["ffn"] == 2 * forward_flops(dense, 4096)["ffn"]
  assert forward_flops(moe, 4096, every_expert=True)["ffn"] == 8 * forward_flops(dense, 4096)["ffn"]
  flops = training_flops(dense, 1, 4096, 0.9)
  assert flops["model"] - flops["sparse"] == pytest.approx(0.9 * 3 * 2 * 32 * 3 * 4096 * 14_336)
  assert training_flops(dense, 1, 4096, 0.0)["sparse"] == flops["model"]
  ragged, every = (dataclasses.replace(moe, remat="none", moe_impl=impl) for impl in ("ragged", "dense"))
  more = training_flops(every, 1, 4096, 0.9)["executed"] - training_flops(ragged, 1, 4096, 0.9)["executed"]
  assert more == pytest.approx(3 * 6 * 2 * 32 * 3 * 4096 * 14_336)  # six of eight experts


def test_a_tpu_computes_the_blocks_of_scores_that_are_not_masked():
  config = PRESETS["llama2_7b"]
  scores = 4 * 32 * 4096 * 4096
  by_xla, by_kernel = (training_flops(config, 1, 4096, 0.9, platform)["executed"] for platform in ("cpu", "tpu"))
  assert by_xla - by_kernel == pytest.approx(scores * (4 - 5.5 * 36 / 64))
  distance = np.arange(2048)[:, None] - np.arange(2048)
  for window in (0, 1, 2, 513, 514, 1500):
    seen = (distance >= 0) & (distance < (window or 2048))
    assert tpu_share(2048, window) == seen.reshape(4, 512, 4, 512).any(axis=(1, 3)).mean()
  assert tpu_share(100, 0) == pytest.approx(1.28**2)


@pytest.mark.parametrize(
  "config",
  [TINY, dataclasses.replace(TINY, num_experts=4, experts_per_token=2, moe_impl="dense")],
  ids=["dense", "moe"],
)
def test_the_forward_pass_is_what_xla_counts(config, monkeypatch):
  """One layer, so that no loop hides work; XLA also counts what is no matrix product, a few percent here."""
  monkeypatch.setattr(library, "available", lambda: False)  # it does not see into native code
  model, time = Transformer(config), 64
  row = jax.ShapeDtypeStruct((1, time), jnp.int32)
  apply = jax.jit(lambda params, *rows: model.apply({"params": params}, *rows))
  counted = apply.lower(abstract_parameters(model)[0], row, row, row).compile().cost_analysis()["flops"]
  ours = time * sum(forward_flops(config, time, every_expert=True).values())
  assert ours < counted < 1.1 * ours
