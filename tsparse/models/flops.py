"""Floating-point operations of a model, counted from its architecture; a compiler counts the body of a loop once."""

from collections.abc import Mapping

from tsparse.models.attention import tpu_share
from tsparse.models.config import FFNS, ModelConfig, parameter_counts

FLOPS_DEFINITION = (
  "2 for each multiply-add of a matrix product. Forward, for one token: 2 x (weights of attention, head, router and "
  "predictors, and of the FFNs, of routed experts those the token meets), plus 4 L N H T for the scores of attention "
  "and what they weigh, the whole row counted although half is masked; a training step is 3 times that (PaLM, arXiv "
  "2204.02311, appendix B). `executed` is what this program does: every expert where all are computed, the scores "
  "again in the backward pass, with remat `full` all layers again; on TPU only the blocks of scores that are not "
  "masked whole, but 11 products of them in a step, not 8. `sparse` is `model` with the FFNs times 1 - zero_fraction: "
  "where the hidden of dReLU is zero so are its gradients; finding the zeros is not counted"
)


def forward_flops(config: ModelConfig, seq_len: int, every_expert: bool = False) -> dict[str, float]:
  """Operations of the forward pass for one token, by component. See FLOPS_DEFINITION.

  Args:
    config: the model.
    seq_len: T.
    every_expert: a token meets all experts (the dense oracle), not experts_per_token of them.
  """
  weights = parameter_counts(config)
  routed = config.experts_per_token / config.num_experts if config.num_experts and not every_expert else 1.0
  return {
    "head": 2 * config.vocab_size * config.d_model,
    "attention": 2 * weights["attention"] + 4 * config.num_layers * config.num_heads * config.head_dim * seq_len,
    "router": 2 * weights["router"],
    "predictor": 2 * weights["predictor"] * routed,
    "ffn": 2 * weights["ffn"] * routed,
    "shared": 2 * weights["shared"],
    "first": 2 * weights["first"],
  }


def training_flops(
  config: ModelConfig, tokens: int, seq_len: int, zero_fraction: float, platform: str = "cpu"
) -> Mapping[str, float]:
  """Operations of a training step over `tokens` tokens: model, executed and sparse. See FLOPS_DEFINITION.

  With remat "dots" or "none" the outputs of the weight matrices are kept.
  """
  needed = forward_flops(config, seq_len)
  done = forward_flops(config, seq_len, every_expert=config.moe_impl == "dense")
  layer = 4 * config.num_heads * config.head_dim * seq_len
  scores = layer * config.num_layers
  others = sum(done.values()) - scores  # what multiplies weights
  if platform == "tpu":  # 2 products forward, in the backward pass these again and 4 + 3 in its two kernels
    attention = layer * 11 / 2 * sum(tpu_share(seq_len, window) for window in config.windows)
  else:  # 2 forward, 2 again, 4 backward
    attention = 4 * scores
  again = others - done["head"] if config.remat == "full" else 0.0
  ffn = sum(needed[name] for name in FFNS)
  return {
    "model": 3 * tokens * sum(needed.values()),
    "executed": tokens * (3 * others + again + attention),
    "sparse": 3 * tokens * (sum(needed.values()) - zero_fraction * ffn),
  }
