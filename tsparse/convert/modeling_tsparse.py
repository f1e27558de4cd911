"""Models with FFN activations (and DeepSeek-MoE, and neuron predictors) that transformers has no classes for.

tsparse copies this file beside an exported model; `trust_remote_code=True` loads it. config.json says the activation in
`ffn_activation`: swiglu, geglu, geglu_tanh, relu, relu2, drelu, shifted_relu:B, fatrelu:T, topk:S or qsparse:S,
functions of (gate, up), and in `hidden_thresholds` whether layers zero what is below a threshold of their own.
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
  Qwen2MoeConfig,
  Qwen2MoeForCausalLM,
)


def largest(hidden, sparsity):
  """[..., F] with the entries largest in size, F - round(sparsity F) of each row, and zeros in the place of others."""
  width = hidden.shape[-1]
  count = width - int(torch.round(torch.tensor(sparsity, dtype=torch.float32) * width))
  kept = hidden.abs().topk(count, dim=-1).indices
  return torch.zeros_like(hidden).scatter(-1, kept, hidden.gather(-1, kept))


ACTIVATIONS = {
  "swiglu": lambda gate, up, _: functional.silu(gate) * up,
  "geglu": lambda gate, up, _: functional.gelu(gate) * up,
  "geglu_tanh": lambda gate, up, _: functional.gelu(gate, approximate="tanh") * up,
  "relu": lambda gate, up, _: torch.relu(gate) * up,
  "relu2": lambda gate, up, _: torch.relu(gate).square() * up,
  "drelu": lambda gate, up, _: torch.relu(gate) * torch.relu(up),
  "shifted_relu": lambda gate, up, shift: torch.relu(gate - shift) * up,
  "fatrelu": lambda gate, up, threshold: torch.where(gate >= threshold, gate, 0) * up,
  "topk": lambda gate, up, sparsity: largest(functional.silu(gate) * up, sparsity),
  "qsparse": lambda gate, up, sparsity: largest(torch.relu(gate).square() * up, sparsity),
}


class Predictor(nn.Module):
  """Mask of the neurons worth computing: sigmoid(fc2 relu(fc1 x)) > 1/2, as inside the TurboSparse models."""

  def __init__(self, config, width, rank):
    super().__init__()
    self.fc1 = nn.Linear(config.hidden_size, rank, bias=False)
    self.fc2 = nn.Linear(rank, width, bias=False)

  def forward(self, x):
    """[..., D] -> [..., F]."""
    return (self.fc2(torch.relu(self.fc1(x))) > 0).to(x.dtype)


class FeedForward(nn.Module):
  """down(act(gate(x), up(x))), times the mask of a predictor where `config.predictor_ranks` says so.

  The hidden is 0 below `threshold`, if there is one: the FFN's own, or that of the layer which an expert is given.
  """

  residual = None  # x before its norm, for predictors that read it

  def __init__(self, config, layer, width, expert=False):
    super().__init__()
    self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
    self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
    name, _, number = config.ffn_activation.partition(":")
    self.activation, self.number = ACTIVATIONS[name], float(number or 0)
    ranks = getattr(config, "predictor_ranks", None)
    self.predictor = Predictor(config, width, ranks[layer]) if ranks else None
    self.threshold = None if expert else threshold_of(config)

  def forward(self, x, residual=None, threshold=None):
    """[..., D] -> [..., D]."""
    threshold = self.threshold if threshold is None else threshold
    hidden = self.activation(self.gate_proj(x), self.up_proj(x), self.number)
    if self.predictor is not None:
      residual = self.residual if residual is None else residual
      hidden = hidden * self.predictor(x if residual is None else residual)
    if threshold is not None:
      hidden = torch.where(hidden.abs() >= threshold.clamp(min=0), hidden, 0)
    return self.down_proj(hidden)


def threshold_of(config):
  """The parameter of a layer's threshold, None where the model has none."""
  return nn.Parameter(torch.zeros(1)) if getattr(config, "hidden_thresholds", False) else None


def first_of(config, *names):
  """The value of the first field that the config has: families call the same thing differently."""
  return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


class MixtureOfExperts(nn.Module):
  """Softmax over the router logits in float32, of which the top k are kept and, as Mixtral does, made to sum to 1."""

  residual = None

  def __init__(self, config, layer):
    super().__init__()
    self.top_k = config.num_experts_per_tok
    self.renormalize = getattr(config, "norm_topk_prob", True)  # Mixtral has no such field, and does
    width = first_of(config, "moe_intermediate_size", "intermediate_size")
    experts = first_of(config, "num_experts", "num_local_experts", "n_routed_experts")
    self.gate = nn.Linear(config.hidden_size, experts, bias=False)
    self.experts = nn.ModuleList(FeedForward(config, layer, width, expert=True) for _ in range(experts))
    self.threshold = threshold_of(config)
    self.shared_expert = self.shared_experts = None
    if hasattr(config, "shared_expert_intermediate_size"):  # Qwen
      self.shared_expert = FeedForward(config, layer, config.shared_expert_intermediate_size)
      self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
    elif getattr(config, "n_shared_experts", None):  # DeepSeek
      self.shared_experts = FeedForward(config, layer, config.n_shared_experts * width)

  def forward(self, x):
    """[B, T, D] -> [B, T, D]."""
    tokens = x.reshape(-1, x.shape[-1])
    residual = tokens if self.residual is None else self.residual.reshape(tokens.shape)
    weights, chosen = functional.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1).topk(self.top_k)
    if self.renormalize:
      weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.to(x.dtype)
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(self.experts):
      token, choice = torch.where(chosen == index)
      out.index_add_(0, token, expert(tokens[token], residual[token], self.threshold) * weights[token, choice, None])
    out = out.view_as(x)
    if self.shared_expert is not None:
      out = out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
    if self.shared_experts is not None:
      out = out + self.shared_experts(x)
    return out


def _replace_ffn(model, config):
  routed = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
  for index, layer in enumerate(model.model.layers):
    if routed and index >= getattr(config, "first_k_dense_replace", 0):
      layer.mlp = MixtureOfExperts(config, index)
    else:
      layer.mlp = FeedForward(config, index, config.intermediate_size)
    if getattr(config, "predictor_input", "") == "before_norm":  # the stock layer hands its FFN the normed input only
      layer.post_attention_layernorm.register_forward_pre_hook(
        lambda _, inputs, ffn=layer.mlp: setattr(ffn, "residual", inputs[0])
      )
  model.post_init()


def _sparse(model_type, config_class, model_class):
  """Config and model of a family, with the FFNs that `config.ffn_activation` and `config.predictor_ranks` say."""

  def __init__(self, config):
    model_class.__init__(self, config)
    _replace_ffn(self, config)

  name = "Tsparse" + model_type.removeprefix("tsparse_").replace("_", " ").title().replace(" ", "")
  config = type(f"{name}Config", (config_class,), {"model_type": model_type})
  exact = {*(model_class._keep_in_fp32_modules_strict or ()), "threshold"}  # float32, whatever the weights are
  fields = {"__init__": __init__, "config_class": config, "_keep_in_fp32_modules_strict": exact}
  return config, type(f"{name}ForCausalLM", (model_class,), fields)


TsparseLlamaConfig, TsparseLlamaForCausalLM = _sparse("tsparse_llama", LlamaConfig, LlamaForCausalLM)
TsparseMistralConfig, TsparseMistralForCausalLM = _sparse("tsparse_mistral", MistralConfig, MistralForCausalLM)
TsparseQwen2Config, TsparseQwen2ForCausalLM = _sparse("tsparse_qwen2", Qwen2Config, Qwen2ForCausalLM)
TsparseGemma2Config, TsparseGemma2ForCausalLM = _sparse("tsparse_gemma2", Gemma2Config, Gemma2ForCausalLM)
TsparseMixtralConfig, TsparseMixtralForCausalLM = _sparse("tsparse_mixtral", MixtralConfig, MixtralForCausalLM)
TsparseOlmoeConfig, TsparseOlmoeForCausalLM = _sparse("tsparse_olmoe", OlmoeConfig, OlmoeForCausalLM)
TsparseQwen2MoeConfig, TsparseQwen2MoeForCausalLM = _sparse("tsparse_qwen2_moe", Qwen2MoeConfig, Qwen2MoeForCausalLM)
# DeepSeek-MoE (v1) has no class in transformers: Llama's attention, shared experts, the first layers dense.
TsparseDeepseekConfig, TsparseDeepseekForCausalLM = _sparse("tsparse_deepseek", LlamaConfig, LlamaForCausalLM)
