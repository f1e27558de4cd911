"""Models that transformers has no class for, against a plain numpy forward: random checkpoints in the published layout.

Names, shapes and forwards: TurboSparse-Mistral and -Mixtral with the predictors merged into them, Bamboo, ReluLLaMA and
ProSparse, DeepSeek-MoE (v1).
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.test_huggingface import our_logits, parameters, tensors, their_logits
from tsparse.convert.convert import convert
from tsparse.convert.model import open_model
from tsparse.errors import UserError

D, F, V, LAYERS, HEADS, KV_HEADS, HEAD = 32, 48, 97, 3, 4, 2, 8
BASE = {
  "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
  "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  "hidden_act": "relu", "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02,
  "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "torch_dtype": "float32",
}  # fmt: skip
EXPERTS = 4
RANKS = (5, 9, 7)
CASES = {
  "relullama": {"model_type": "llama"},
  "prosparse": {"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": 0.3},
  "bamboo": {"model_type": "bamboo", "sliding_window": 7},
  "turbosparse_mistral": {"model_type": "bamboo", "sliding_window": 7, "ranks": RANKS},
  "turbosparse_mixtral": {
    "model_type": "turbosparsemixtral", "sliding_window": None, "rope_theta": 1e6, "ranks": RANKS,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
  },
  "deepseek": {
    "model_type": "deepseek", "hidden_act": "silu", "attention_bias": False, "aux_loss_alpha": 0.001, "seq_aux": True,
    "first_k_dense_replace": 1, "moe_intermediate_size": 24, "moe_layer_freq": 1, "n_routed_experts": EXPERTS,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 2, "pretraining_tp": 1, "rope_scaling": None,
    "scoring_func": "softmax",
  },
}  # fmt: skip


def shapes_of(fields, ranks):
  """Name -> shape of every tensor, as published."""
  shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}

  def ffn(prefix, width, names=("gate_proj", "up_proj", "down_proj"), rank=0):
    gate, up, down = names
    shapes.update({f"{prefix}{gate}.weight": (width, D), f"{prefix}{up}.weight": (width, D)})
    shapes[f"{prefix}{down}.weight"] = (D, width)
    if rank:
      shapes.update({f"{prefix}predictor.fc1.weight": (rank, D), f"{prefix}predictor.fc2.weight": (width, rank)})

  for i in range(LAYERS):
    layer, rank = f"model.layers.{i}.", ranks[i] if ranks else 0
    shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (D,)
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
      shapes[f"{layer}self_attn.{name}_proj.weight"] = (heads * HEAD, D)
    shapes[f"{layer}self_attn.o_proj.weight"] = (D, HEADS * HEAD)
    if fields["model_type"] == "turbosparsemixtral":
      shapes[f"{layer}block_sparse_moe.gate.weight"] = (EXPERTS, D)
      for e in range(EXPERTS):
        ffn(f"{layer}block_sparse_moe.experts.{e}.", F, ("w1", "w3", "w2"), rank)
    elif fields["model_type"] == "deepseek" and i >= fields["first_k_dense_replace"]:
      width = fields["moe_intermediate_size"]
      shapes[f"{layer}mlp.gate.weight"] = (EXPERTS, D)
      for e in range(EXPERTS):
        ffn(f"{layer}mlp.experts.{e}.", width)
      ffn(f"{layer}mlp.shared_experts.", width * fields["n_shared_experts"])
    else:
      ffn(f"{layer}mlp.", F, rank=rank)
  return shapes


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def numpy_logits(weights, fields, tokens):
  """[T] -> [T, V], in float64, one token and one expert at a time where that is plainer."""
  w = {name: x.astype(np.float64) for name, x in weights.items()}
  kind, act = fields["model_type"], fields["hidden_act"]
  drelu = kind in ("bamboo", "turbosparsemixtral")
  gate_of = {
    "relu": lambda x: np.maximum(x, 0),
    "fatrelu": lambda x: np.where(x >= fields["hidden_act_param"], x, 0),
    "silu": lambda x: x * sigmoid(x),
  }[act]

  def norm(x, name):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + fields["rms_norm_eps"]) * w[name]

  def rope(x):  # [T, heads, H]
    angle = np.arange(len(x))[:, None] * fields["rope_theta"] ** (-np.arange(0, HEAD, 2) / HEAD)
    angle = np.concatenate([angle, angle], -1)[:, None]
    rotated = np.concatenate([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
    return x * np.cos(angle) + rotated * np.sin(angle)

  def attend(layer, x):
    q, k, v = ((x @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(x), -1, HEAD) for name in ("q", "k", "v"))
    q, k = rope(q), rope(k)
    t = np.arange(len(x))
    away = t[:, None] - t[None]
    seen = (away >= 0) & (away < (fields.get("sliding_window") or len(x)))
    heads = []
    for n in range(HEADS):
      kv = n // (HEADS // KV_HEADS)
      scores = np.where(seen, q[:, n] @ k[:, kv].T / np.sqrt(HEAD), -np.inf)
      heads.append(softmax(scores) @ v[:, kv])
    return np.concatenate(heads, -1) @ w[f"{layer}self_attn.o_proj.weight"].T

  def ffn(prefix, x, before_norm, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (w[f"{prefix}{name}.weight"] for name in names)
    ups = np.maximum(x @ up.T, 0) if drelu else x @ up.T
    hidden = gate_of(x @ gate.T) * ups
    if f"{prefix}predictor.fc1.weight" in w:
      fc1, fc2 = w[f"{prefix}predictor.fc1.weight"], w[f"{prefix}predictor.fc2.weight"]
      read = before_norm if kind == "bamboo" else x
      hidden *= np.round(sigmoid(np.maximum(read @ fc1.T, 0) @ fc2.T))
    return hidden @ down.T

  def mixture(prefix, x, before_norm, names, renormalize):
    out = np.zeros_like(x)
    probabilities = softmax(x @ w[f"{prefix}gate.weight"].T)
    for t in range(len(x)):
      chosen = np.argsort(-probabilities[t])[:2]
      for e in chosen:
        weight = probabilities[t, e] / (probabilities[t, chosen].sum() if renormalize else 1)
        out[t] += weight * ffn(f"{prefix}experts.{e}.", x[t], before_norm[t], names)
    return out

  x = w["model.embed_tokens.weight"][tokens]
  for i in range(LAYERS):
    layer = f"model.layers.{i}."
    x = x + attend(layer, norm(x, f"{layer}input_layernorm.weight"))
    normed = norm(x, f"{layer}post_attention_layernorm.weight")
    if kind == "turbosparsemixtral":
      out = mixture(f"{layer}block_sparse_moe.", normed, x, ("w1", "w3", "w2"), True)
    elif f"{layer}mlp.gate.weight" in w:
      out = mixture(f"{layer}mlp.", normed, x, ("gate_proj", "up_proj", "down_proj"), False)
      out += ffn(f"{layer}mlp.shared_experts.", normed, x)
    else:
      out = ffn(f"{layer}mlp.", normed, x)
    x = x + out
  return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def write_checkpoint(folder, case):
  fields = BASE | CASES[case]
  ranks = fields.pop("ranks", ())
  rng = np.random.default_rng(0)
  weights = {
    name: (rng.normal(0, 0.25, shape) + (len(shape) == 1)).astype(np.float32)
    for name, shape in shapes_of(fields, ranks).items()
  }
  folder.mkdir()
  save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(fields))
  return weights, fields


@pytest.mark.parametrize("case", CASES)
def test_the_forward_is_that_of_numpy_and_of_its_export_in_transformers(case, tmp_path):
  import transformers

  theirs, ours, out = tmp_path / "theirs", tmp_path / "ours", tmp_path / "out"
  weights, fields = write_checkpoint(theirs, case)
  convert(theirs, ours, "tsparse")
  tokens = np.random.default_rng(1).integers(0, V, (2, 30))
  expected = np.stack([numpy_logits(weights, fields, row) for row in tokens])
  for path in (theirs, ours):
    np.testing.assert_allclose(our_logits(path, tokens), expected, atol=1e-4, rtol=0)

  # two documents packed into a row of the same length, and padding behind them
  segment_ids = np.repeat([[1, 2, 0]], (11, 15, 4), axis=1)
  positions = np.concatenate([np.arange(11), np.arange(15), np.zeros(4, int)])[None]
  packed = our_logits(ours, tokens[:1], segment_ids=segment_ids, positions=positions)[0]
  for document in (slice(0, 11), slice(11, 26)):
    alone = numpy_logits(weights, fields, tokens[0, document])
    np.testing.assert_allclose(packed[document], alone, atol=1e-4, rtol=0)

  convert(ours, out, "hf")
  back = tensors(out)
  assert len(back) == len(weights)
  for name, tensor in back.items():
    if case == "turbosparse_mixtral":  # its experts are written by the names of a dense FFN
      for written, published in (
        ("mlp", "block_sparse_moe"),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
      ):
        name = name.replace(written, published)
    np.testing.assert_array_equal(tensor, weights[name])
  exported = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, attn_implementation="eager")
  np.testing.assert_allclose(their_logits(exported, tokens), expected, atol=1e-4, rtol=0)
  jax.tree.map(np.testing.assert_array_equal, parameters(open_model(out)), parameters(open_model(ours)))


def test_predictors_of_smaller_rank_are_padded_with_zeros(tmp_path):
  write_checkpoint(tmp_path / "theirs", "turbosparse_mistral")
  model = open_model(tmp_path / "theirs")
  assert (model.config.predictor_ranks, model.config.predictor_input) == (RANKS, "before_norm")
  params = parameters(model)
  fc1 = params["layers"]["ffn"]["predictor"]["fc1"]
  assert fc1.shape == (LAYERS, D, max(RANKS)) and not fc1[0, :, RANKS[0] :].any() and fc1[0, :, : RANKS[0]].all()


def test_a_predictor_missing_in_a_layer_is_refused(tmp_path):
  weights, _ = write_checkpoint(tmp_path / "theirs", "turbosparse_mistral")
  del weights["model.layers.1.mlp.predictor.fc1.weight"]
  save_file(weights, tmp_path / "theirs" / "model.safetensors")
  with pytest.raises(UserError, match="predictor"):
    open_model(tmp_path / "theirs")
