"""Others that decode a model of the same shape with random weights, embedding and head included, for decode.py."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.constructed import POOL, pool
from tsparse.models.config import ModelConfig


def clock(function: Callable, *args: Any) -> tuple[float, Any]:
  """Seconds of a call, and what it returns."""
  start = time.perf_counter()
  value = function(*args)
  return time.perf_counter() - start, value


def transformers(config: ModelConfig, tokens: int, dtype: str) -> float:
  """Least seconds of a token by transformers and torch."""
  import torch
  from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig

  fields = {
    "vocab_size": config.vocab_size, "hidden_size": config.d_model, "intermediate_size": config.d_ff,
    "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
  }  # fmt: skip
  theirs = (MixtralConfig if config.num_experts else MistralConfig)(**fields)
  with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(theirs, dtype=getattr(torch, dtype))
  model = model.to_empty(device="cpu").eval()
  values = torch.from_numpy(pool().astype(np.float32) * 0.02).to(getattr(torch, dtype))
  for parameter in model.parameters():
    flat = parameter.data.view(-1)
    for start in range(0, len(flat), POOL):
      flat[start : start + POOL] = values[: len(flat) - start]
  rotary = model.model.rotary_emb
  rotary.inv_freq = torch.ones_like(rotary.inv_freq)
  best, cache, token = float("inf"), None, torch.tensor([[1]])
  with torch.inference_mode():
    for i in range(tokens + 1):
      taken, out = clock(lambda: model(token, past_key_values=cache, use_cache=True))  # noqa: B023
      cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
      best = min(best, taken) if i else best
  return best


def llama_cpp(config: ModelConfig, tokens: int) -> float:
  """Least seconds of a token by llama.cpp, from a GGUF in float16; its FFN is SwiGLU, which costs it no less."""
  from llama_cpp import Llama

  with tempfile.TemporaryDirectory(prefix="tsparse_gguf_") as folder:
    path = Path(folder) / "model.gguf"
    write_gguf(config, path)
    threads = os.cpu_count()
    model = Llama(
      str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, n_batch=8, use_mmap=False, verbose=False
    )
  best = float("inf")
  for i in range(tokens + 1):
    taken, _ = clock(model.eval, [1 + i % (config.vocab_size - 1)])
    best = min(best, taken) if i else best
  model.close()
  return best


def write_gguf(config: ModelConfig, path: Path):
  """A GGUF of that shape without a tokenizer: matrices in float16, random, written one by one."""
  import gguf

  writer = gguf.GGUFWriter(path, "llama")
  writer.add_vocab_size(config.vocab_size)
  writer.add_tokenizer_model("none")
  writer.add_context_length(512)
  writer.add_embedding_length(config.d_model)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
  if config.num_experts:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
  shapes = dict(gguf_shapes(config))
  dtypes = {name: np.float32 if "norm" in name or "gate_inp" in name else np.float16 for name in shapes}
  for name, shape in shapes.items():
    writer.add_tensor_info(name, shape, np.dtype(dtypes[name]), math.prod(shape) * np.dtype(dtypes[name]).itemsize)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  values = pool().astype(np.float32) * 0.02
  for name, shape in shapes.items():
    writer.write_tensor_data(np.resize(values.astype(dtypes[name]), shape))
  writer.close()


def gguf_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Name and shape of each tensor, [out, in]."""
  dim, width, experts = config.d_model, config.d_ff, config.num_experts
  heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  yield from ((f"{name}.weight", (config.vocab_size, dim)) for name in ("token_embd", "output"))
  yield "output_norm.weight", (dim,)
  for layer in range(config.num_layers):
    shapes = {
      "attn_norm": (dim,), "ffn_norm": (dim,),
      "attn_q": (heads, dim), "attn_k": (kv_heads, dim), "attn_v": (kv_heads, dim), "attn_output": (dim, heads),
    }  # fmt: skip
    ffn = {"ffn_gate": (width, dim), "ffn_up": (width, dim), "ffn_down": (dim, width)}
    if experts:
      ffn = {"ffn_gate_inp": (experts, dim)} | {f"{name}_exps": (experts, *shape) for name, shape in ffn.items()}
    yield from ((f"blk.{layer}.{name}.weight", shape) for name, shape in (shapes | ffn).items())
