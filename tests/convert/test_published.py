"""config.json of models as they are published: each is read, whatever it says that is no matter of maths."""

import json

import pytest

from tsparse.convert.families import read_config
from tsparse.errors import UserError
from tsparse.models.config import parameter_counts

# What nearly every published config.json says too.
COMMON = {
  "architectures": ["X"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "initializer_range": 0.02, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.4",
  "use_cache": True,
}  # fmt: skip


def config(kind, vocab, layers, width, ffn, heads, kv_heads, length, eps, **fields):
  """A config.json: what all have by position, `fields` of it beyond."""
  return COMMON | {
    "model_type": kind, "vocab_size": vocab, "num_hidden_layers": layers, "hidden_size": width,
    "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    "max_position_embeddings": length, "rms_norm_eps": eps,
  } | fields  # fmt: skip


LLAMA_3 = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0}
ROPE_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN = {"use_sliding_window": False, "max_window_layers": 28, "rope_theta": 1000000.0}
GEMMA = {
  "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "sliding_window": 4096,
  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid", "pad_token_id": 0,
  "attention_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
BAMBOO = {"hidden_act": "relu", "auto_map": {"AutoConfig": "configuration_bamboo.BambooConfig"}, "rope_theta": 10000.0}
# name -> (config.json, the number of its parameters)
PUBLISHED = {
  "huggyllama/llama-7b": (
    {
      name: value
      for name, value in config(
        "llama", 32000, 32, 4096, 11008, 32, 32, 2048, 1e-6, pad_token_id=0, max_sequence_length=2048
      ).items()
      if name not in ("num_key_value_heads", "max_position_embeddings")
    },
    6_738_415_616,
  ),
  "meta-llama/Llama-2-7b-hf": (
    config(
      "llama", 32000, 32, 4096, 11008, 32, 32, 4096, 1e-5, pretraining_tp=1, rope_scaling=None, torch_dtype="float16",
      _name_or_path="meta-llama/Llama-2-7b-hf",
    ),
    6_738_415_616,
  ),
  "meta-llama/Meta-Llama-3-8B": (
    config("llama", 128256, 32, 4096, 14336, 32, 8, 8192, 1e-5, **LLAMA_3, rope_scaling=None),
    8_030_261_248,
  ),
  "meta-llama/Llama-3.1-8B-Instruct": (
    config(
      "llama", 128256, 32, 4096, 14336, 32, 8, 131072, 1e-5, **LLAMA_3,
      rope_scaling=ROPE_3 | {"factor": 8.0, "rope_type": "llama3"}, eos_token_id=[128001, 128008, 128009],
    ),
    8_030_261_248,
  ),
  "meta-llama/Llama-3.2-1B": (
    config(
      "llama", 128256, 16, 2048, 8192, 32, 8, 131072, 1e-5, **LLAMA_3, head_dim=64, tie_word_embeddings=True,
      rope_scaling=ROPE_3 | {"factor": 32.0, "rope_type": "llama3"},
    ),
    1_235_814_400,
  ),
  "mistralai/Mistral-7B-v0.1": (
    config("mistral", 32000, 32, 4096, 14336, 32, 8, 32768, 1e-5, rope_theta=10000.0, sliding_window=4096),
    7_241_732_096,
  ),
  "mistralai/Mistral-7B-Instruct-v0.2": (
    config("mistral", 32000, 32, 4096, 14336, 32, 8, 32768, 1e-5, rope_theta=1000000.0, sliding_window=None),
    7_241_732_096,
  ),
  "mistralai/Mistral-7B-v0.3": (
    config(
      "mistral", 32768, 32, 4096, 14336, 32, 8, 32768, 1e-5, rope_theta=1000000.0, sliding_window=None, head_dim=None
    ),
    7_248_023_552,
  ),
  "mistralai/Mixtral-8x7B-v0.1": (
    config(
      "mixtral", 32000, 32, 4096, 14336, 32, 8, 32768, 1e-5, rope_theta=1000000.0, sliding_window=None,
      num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, router_aux_loss_coef=0.02,
    ),
    46_702_792_704,
  ),
  "Qwen/Qwen2-7B": (
    config("qwen2", 152064, 28, 3584, 18944, 28, 4, 131072, 1e-6, **QWEN, sliding_window=131072),
    7_615_616_512,
  ),
  "Qwen/Qwen2.5-0.5B": (
    config(
      "qwen2", 151936, 24, 896, 4864, 14, 2, 32768, 1e-6, **QWEN, sliding_window=32768, tie_word_embeddings=True,
      use_mrope=False,
    ),
    494_032_768,
  ),
  "Qwen/Qwen2.5-7B, as transformers 4.5 saves it": (
    config(
      "qwen2", 152064, 28, 3584, 18944, 28, 4, 131072, 1e-6, **QWEN, sliding_window=None, rope_scaling=None,
      layer_types=["full_attention"] * 28, dtype="bfloat16",
    ),
    7_615_616_512,
  ),
  "Qwen/Qwen1.5-MoE-A2.7B": (
    config(
      "qwen2_moe", 151936, 24, 2048, 5632, 16, 16, 8192, 1e-6, **QWEN, sliding_window=32768, decoder_sparse_step=1,
      moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts_per_tok=4, num_experts=60,
      norm_topk_prob=False, output_router_logits=False, router_aux_loss_coef=0.001,
    ),
    14_315_784_192,
  ),
  "deepseek-ai/deepseek-moe-16b-base": (
    config(
      "deepseek", 102400, 28, 2048, 10944, 16, 16, 4096, 1e-6, attention_bias=False, aux_loss_alpha=0.001,
      auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"}, first_k_dense_replace=1,
      moe_intermediate_size=1408, moe_layer_freq=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False,
      num_experts_per_tok=6, pretraining_tp=1, rope_scaling=None, rope_theta=10000, scoring_func="softmax",
      seq_aux=True,
    ),
    16_375_728_128,
  ),
  "allenai/OLMoE-1B-7B-0924": (
    config(
      "olmoe", 50304, 16, 2048, 1024, 16, 16, 4096, 1e-5, attention_bias=False, clip_qkv=None, norm_topk_prob=False,
      num_experts=64, num_experts_per_tok=8, output_router_logits=False, pad_token_id=1, rope_scaling=None,
      rope_theta=10000.0, router_aux_loss_coef=0.01,
    ),
    6_919_161_856,
  ),
  "google/gemma-2-2b": (
    config("gemma2", 256000, 26, 2304, 9216, 8, 4, 8192, 1e-6, **GEMMA, query_pre_attn_scalar=256),
    2_614_341_888,
  ),
  "google/gemma-2-9b-it": (
    config(
      "gemma2", 256000, 42, 3584, 14336, 16, 8, 8192, 1e-6, **GEMMA, query_pre_attn_scalar=256, sliding_window_size=4096
    ),
    9_241_705_984,
  ),
  "SparseLLM/ReluLLaMA-7B": (
    config("llama", 32000, 32, 4096, 11008, 32, 32, 4096, 1e-5, hidden_act="relu", pretraining_tp=1, rope_scaling=None),
    6_738_415_616,
  ),
  "PowerInfer/Bamboo-base-v0_1": (
    config("bamboo", 32000, 32, 4096, 14336, 32, 8, 32768, 1e-5, **BAMBOO, sliding_window=4096),
    7_241_732_096,
  ),
  "PowerInfer/TurboSparse-Mistral-Instruct": (
    config("bamboo", 32064, 32, 4096, 14336, 32, 8, 32768, 1e-5, **BAMBOO, sliding_window=4096),
    7_242_256_384,
  ),
}  # fmt: skip
for name in ("google/gemma-2-2b", "google/gemma-2-9b-it"):
  del PUBLISHED[name][0]["tie_word_embeddings"]  # they leave it to the default of the family


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name):
  fields, parameters = PUBLISHED[name]
  assert sum(parameter_counts(read_config(fields, {})[1]).values()) == parameters


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Olmoe", "Gemma2"])
def test_every_field_that_transformers_writes_is_read(family):
  import transformers

  fields = json.loads(json.dumps(getattr(transformers, f"{family}Config")().to_dict()))
  surplus = {"quantization_config": None, "_commit_hash": "1", "torchscript": False, "tf_legacy_loss": False}
  read_config(fields | surplus, {})
  with pytest.raises(UserError, match="quantization_config = {'bits': 4} is not supported"):
    read_config(fields | {"quantization_config": {"bits": 4}}, {})
