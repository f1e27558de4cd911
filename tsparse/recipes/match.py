"""A warm start: each FFN learns to give what the teacher's gives on the same input, without the rest of the model.

    loss = mean over the layers of  sum over the real tokens ||FFN(x) - FFN_teacher(x)||^2 / sum ||FFN_teacher(x)||^2

The sums are over all real tokens of the whole batch, scored or not, in however many microbatches it is computed. x and
FFN_teacher(x) come from one forward pass of the teacher, and every layer is trained on the right input from the first
step on (FitNets, arXiv 1412.6550, matches layers; the teacher's input is that of layer-wise reconstruction as in GPTQ,
arXiv 2210.17323).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tsparse.models.transformer import FeedForward, FFNPass, Transformer

Array = jax.Array


def squared_aims(passes: Mapping[str, FFNPass], valid: Array) -> dict[str, Array]:
  """By stack of layers [L] float32: sum over the tokens where valid [B, T] of ||FFN_teacher(x)||^2."""
  return {
    name: jnp.sum(jnp.square(seen.out.astype(jnp.float32)), axis=(1, 2, 3), where=valid[..., None])
    for name, seen in passes.items()
  }


def matching_loss(
  student: Transformer,
  params: Any,
  passes: Mapping[str, FFNPass],
  aims: Mapping[str, Array],
  valid: Array,
  intervention: Mapping[str, Any],
) -> Array:
  """[] float32; its gradient reaches the FFNs alone. Over microbatches it adds up to that of the batch of the `aims`.

  Args:
    student: the decoder, of the teacher's shape.
    params: its parameters.
    passes: by stack of layers ("first", "layers") what the teacher's FFNs read and gave, leading axis L.
    aims: `squared_aims` of the whole batch.
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
      weights, seen, aim, interventions = parts
      out, _ = ffn.apply({"params": weights}, seen.x, seen.residual, valid, interventions, None)
      missed = out.astype(jnp.float32) - seen.out.astype(jnp.float32)
      missed = jnp.sum(jnp.square(missed), where=valid[..., None])
      return total + missed / jnp.maximum(aim, 1e-30), None

    parts = params[name]["ffn"], seen, aims[name], interventions
    total, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), total, parts)
  return total / config.num_layers
