"""Random Hugging Face models and the same weights in our layout, for parity tests."""

import numpy as np


def parameters(state: dict, config) -> dict:
  """Our parameter tree of a Hugging Face Llama, Mistral or Mixtral state dict (numpy arrays)."""
  heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}

  def stack(template, change):
    return np.stack([change(state[template.format(layer)]) for layer in range(config.num_layers)])

  def split(name):  # [N * H, D] -> [D, N, H]
    template = f"model.layers.{{}}.self_attn.{name}_proj.weight"
    return stack(template, lambda w: w.T.reshape(config.d_model, heads[name], config.head_dim))

  if config.num_experts:
    block = "model.layers.{}.mlp."
    fused = block + "experts.gate_up_proj"  # [E, 2F, D], gate first
    ffn = {
      "router": stack(block + "gate.weight", np.transpose),
      "gate": stack(fused, lambda w: w[:, : config.d_ff].swapaxes(1, 2)),
      "up": stack(fused, lambda w: w[:, config.d_ff :].swapaxes(1, 2)),
      "down": stack(block + "experts.down_proj", lambda w: w.swapaxes(1, 2)),
    }
  else:
    ffn = {name: stack(f"model.layers.{{}}.mlp.{name}_proj.weight", np.transpose) for name in ("gate", "up", "down")}
  tree = {
    "embed": state["model.embed_tokens.weight"],
    "final_norm": state["model.norm.weight"],
    "layers": {
      "attention_norm": stack("model.layers.{}.input_layernorm.weight", np.array),
      "ffn_norm": stack("model.layers.{}.post_attention_layernorm.weight", np.array),
      "attention": {
        "query": split("q"),
        "key": split("k"),
        "value": split("v"),
        "out": stack(
          "model.layers.{}.self_attn.o_proj.weight",
          lambda w: w.T.reshape(config.num_heads, config.head_dim, config.d_model),
        ),
      },
      "ffn": ffn,
    },
  }
  return tree if config.tie_embeddings else tree | {"head": state["lm_head.weight"].T}
