"""A warm start: each FFN learns to give what the teacher's gives on the same input, without the rest of the model.

    loss = mean over the layers of  sum over the real tokens ||FFN(x) - FFN_teacher(x)||^2 / sum ||FFN_teacher(x)||^2

x and FFN_teacher(x) come from one forward pass of the teacher, and every layer is trained on the right input from the
first step on (FitNets, arXiv 1412.6550, matches layers; the teacher's input is that of layer-wise reconstruction as in
GPTQ, arXiv 2210.17323).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tsparse.models.transformer import FeedForward, FFNPass, Transformer

Array = jax.Array


def matching_loss(
  student: Transformer, params: Any, passes: Mapping[str, FFNPass], valid: Array, intervention: Mapping[str, Any]
) -> Array:
  """[] float32; its gradient reaches the FFNs alone.

  Args:
    student: the decoder, of the teacher's shape.
    params: its parameters.
    passes: by stack of layers ("first", "layers") what the teacher's FFNs read and gave, leading axis L.
    valid: [B, T] bool.
    intervention: see Transformer.
  """
  config, total = student.config, jnp.zeros(())
  for name, seen in passes.items():
    first = name == "first"
    ffn = FeedForward(config.first if first else config)
    kinds = {"ffn": "first"} if first else {"ffn": "ffn", "shared": "shared"}
    interventions = {kind: intervention[of] for kind, of in kinds.items() if of in intervention}

    def layer(total, parts, ffn=ffn):
      weights, seen, interventions = parts
      out, _ = ffn.apply({"params": weights}, seen.x, seen.residual, valid, interventions, None)
      target = seen.out.astype(jnp.float32)
      missed = jnp.sum(jnp.square(out.astype(jnp.float32) - target), where=valid[..., None])
      return total + missed / jnp.maximum(jnp.sum(jnp.square(target), where=valid[..., None]), 1e-30), None

    total, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), total, (params[name]["ffn"], seen, interventions))
  return total / config.num_layers
