"""Llama, Mistral, Qwen2, Gemma 2, Mixtral and OLMoE with FFN activations that transformers' classes cannot express.

tsparse copies this file beside an exported model; `trust_remote_code=True` loads it. config.json says the activation in
`ffn_activation`: swiglu, geglu, geglu_tanh, relu, relu2, drelu, shifted_relu:B or fatrelu:T, functions of (gate, up).
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import (
  Gemma2Config,
  Gemma2ForCausalLM,
  LlamaConfig,
  LlamaForCausalLM,
  MistralConfig,
  MistralForCausalLM,
  MixtralConfig,
  MixtralForCausalLM,
  OlmoeConfig,
  OlmoeForCausalLM,
  Qwen2Config,
  Qwen2ForCausalLM,
)

ACTIVATIONS = {
  "swiglu": lambda gate, up, _: functional.silu(gate) * up,
  "geglu": lambda gate, up, _: functional.gelu(gate) * up,
  "geglu_tanh": lambda gate, up, _: functional.gelu(gate, approximate="tanh") * up,
  "relu": lambda gate, up, _: torch.relu(gate) * up,
  "relu2": lambda gate, up, _: torch.relu(gate).square() * up,
  "drelu": lambda gate, up, _: torch.relu(gate) * torch.relu(up),
  "shifted_relu": lambda gate, up, shift: torch.relu(gate - shift) * up,
  "fatrelu": lambda gate, up, threshold: torch.where(gate >= threshold, gate, 0) * up,
}


class FeedForward(nn.Module):
  """down(act(gate(x), up(x)))."""

  def __init__(self, config):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
    name, _, number = config.ffn_activation.partition(":")
    self.activation, self.number = ACTIVATIONS[name], float(number or 0)

  def forward(self, x):
    """[..., D] -> [..., D]."""
    return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x), self.number))


class MixtureOfExperts(nn.Module):
  """Softmax over the top-k router logits (over all of them for OLMoE), in float32; a token meets its experts only."""

  def __init__(self, config):
    super().__init__()
    self.top_k = config.num_experts_per_tok
    self.renormalize = getattr(config, "norm_topk_prob", True)  # Mixtral has no such field, and does
    experts = config.num_experts if isinstance(config, OlmoeConfig) else config.num_local_experts
    self.gate = nn.Linear(config.hidden_size, experts, bias=False)
    self.experts = nn.ModuleList(FeedForward(config) for _ in range(experts))

  def forward(self, x):
    """[B, T, D] -> [B, T, D]."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = functional.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1).topk(self.top_k)
    if self.renormalize:
      weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.to(x.dtype)
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(self.experts):
      token, choice = torch.where(chosen == index)
      out.index_add_(0, token, expert(tokens[token]) * weights[token, choice, None])
    return out.view_as(x)


def _replace_ffn(model, config, kind):
  for layer in model.model.layers:
    layer.mlp = kind(config)
  model.post_init()


class TsparseLlamaConfig(LlamaConfig):
  """LlamaConfig with `ffn_activation`."""

  model_type = "tsparse_llama"


class TsparseMistralConfig(MistralConfig):
  """MistralConfig with `ffn_activation`."""

  model_type = "tsparse_mistral"


class TsparseMixtralConfig(MixtralConfig):
  """MixtralConfig with `ffn_activation`."""

  model_type = "tsparse_mixtral"


class TsparseLlamaForCausalLM(LlamaForCausalLM):
  """Llama with the FFN of `config.ffn_activation`."""

  config_class = TsparseLlamaConfig

  def __init__(self, config):
    super().__init__(config)
    _replace_ffn(self, config, FeedForward)


class TsparseMistralForCausalLM(MistralForCausalLM):
  """Mistral with the FFN of `config.ffn_activation`."""

  config_class = TsparseMistralConfig

  def __init__(self, config):
    super().__init__(config)
    _replace_ffn(self, config, FeedForward)


class TsparseMixtralForCausalLM(MixtralForCausalLM):
  """Mixtral with the experts of `config.ffn_activation`."""

  config_class = TsparseMixtralConfig

  def __init__(self, config):
    super().__init__(config)
    _replace_ffn(self, config, MixtureOfExperts)


class TsparseQwen2Config(Qwen2Config):
  """Qwen2Config with `ffn_activation`."""

  model_type = "tsparse_qwen2"


class TsparseGemma2Config(Gemma2Config):
  """Gemma2Config with `ffn_activation`."""

  model_type = "tsparse_gemma2"


class TsparseGemma2ForCausalLM(Gemma2ForCausalLM):
  """Gemma 2 with the FFN of `config.ffn_activation`."""

  config_class = TsparseGemma2Config

  def __init__(self, config):
    super().__init__(config)
    _replace_ffn(self, config, FeedForward)


class TsparseOlmoeConfig(OlmoeConfig):
  """OlmoeConfig with `ffn_activation`."""

  model_type = "tsparse_olmoe"


class TsparseQwen2ForCausalLM(Qwen2ForCausalLM):
  """Qwen2 with the FFN of `config.ffn_activation`."""

  config_class = TsparseQwen2Config

  def __init__(self, config):
    super().__init__(config)
    _replace_ffn(self, config, FeedForward)


class TsparseOlmoeForCausalLM(OlmoeForCausalLM):
  """OLMoE with the experts of `config.ffn_activation`."""

  config_class = TsparseOlmoeConfig

  def __init__(self, config):
    super().__init__(config)
    _replace_ffn(self, config, MixtureOfExperts)
