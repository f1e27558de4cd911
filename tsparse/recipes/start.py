"""The FFNs of a SwiGLU model made ready for what will make zeros in them, before the first step, without a gradient.

`signs` turns neurons over. silu(gate) * up is odd in up, so that (up, down) -> (-up, -down) of a neuron changes nothing
of the SwiGLU model; dReLU keeps the half where up is positive, and of the two halves the one with more of

    E[max(0, gate)^2 max(0, +-up)^2]

is chosen. `norms` scales neurons, (up, down) -> (c up, down / c), which changes nothing either, so that the rows of
`down` are of one length: an entry of the hidden is then as large as what it adds to the output. `thresholds` gives each
layer (models/threshold.py) the largest one that leaves at most the share `sparsity.target` of its hidden below it; with
experts the mean of theirs, weighted by their tokens. `refit` then solves for `down` by least squares, so that the new
hidden h gives what the old FFN gave, y:

    down' = (E[h h^T] + RIDGE tr(E[h h^T]) / F I)^-1 E[h y^T]

(as layer-wise reconstruction after pruning does, SparseGPT, arXiv 2301.00774). Means are over the tokens that reach the
FFN in the old model, of TOKENS tokens that training is about to read: no other data is used. On stories260k the loss of
the swapped model falls from 6.85 (swap alone) to 4.57 (signs) to 2.40 (signs and refit), 1.373 being SwiGLU's; with
thresholds at 80 % it is 1.74.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tsparse.activations import activation
from tsparse.errors import UserError
from tsparse.models.layers import project
from tsparse.models.router import route, router_logits
from tsparse.models.threshold import jump
from tsparse.models.transformer import Transformer, ffn_passes

Array = jax.Array

STEPS = ("signs", "norms", "thresholds", "refit")
NAMES = ("gate", "up", "down")
RIDGE = 1e-3
TOKENS = 32_768


def parse(text: str) -> tuple[str, ...]:
  """ "signs,refit" -> ("signs", "refit"); UserError for another name."""
  names = tuple(filter(None, (name.strip() for name in text.split(","))))
  for name in names:
    if name not in STEPS:
      raise UserError(f"config.sparsity.start names {name!r}: choose of {', '.join(STEPS)}, or '' for neither.")
  return tuple(name for name in STEPS if name in names)


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5), donate_argnums=2)
def start(
  old: Transformer, new: Transformer, params: Any, batch: Mapping[str, Array], steps: Sequence[str], zeros: float = 0.0
) -> Any:
  """The parameters of `old` made ready for the activation of `new`: one forward pass, then layer by layer.

  Args:
    old: a SwiGLU decoder.
    new: the same with another activation.
    params: of `old`; given away.
    batch: inputs, segment_ids and positions, [B, T] int32, about TOKENS tokens.
    steps: of STEPS, in their order.
    zeros: the share that `thresholds` are to make.
  """
  _, passes = ffn_passes(old, params, batch)
  valid = batch["segment_ids"] > 0

  def changed(ffn, x, reached):
    return _one(old, new, steps, zeros, x, reached, *(ffn[name] for name in NAMES))

  def layer(_, parts):
    ffn, seen = parts
    if "router" not in ffn:
      found = changed(ffn, seen.x, valid)
    else:
      logits = router_logits(seen.x, ffn["router"])
      chosen, _ = route(logits, valid, old.config.experts_per_token, old.config.router_renormalize)

      def expert(parts):  # one expert's hidden of all tokens is in memory at a time
        number, weights = parts
        reached = jnp.any(chosen == number, axis=-1)
        return changed(weights, seen.x, reached), jnp.sum(reached)

      numbers = jnp.arange(ffn["gate"].shape[0])
      found, tokens = jax.lax.map(expert, (numbers, {name: ffn[name] for name in NAMES}))
      if "threshold" in found:
        found["threshold"] = jnp.sum(found["threshold"] * (tokens / jnp.maximum(tokens.sum(), 1)))
    ffn |= found
    if "shared" in ffn:
      ffn |= {"shared": ffn["shared"] | changed(ffn["shared"], seen.x, valid)}
    return None, ffn

  stacks = {name: jax.lax.scan(layer, None, (params[name]["ffn"], seen))[1] for name, seen in passes.items()}
  return params | {name: params[name] | {"ffn": ffn} for name, ffn in stacks.items()}


def _one(
  old: Transformer,
  new: Transformer,
  steps: Sequence[str],
  zeros: float,
  x: Array,
  reached: Array,
  gate: Array,
  up: Array,
  down: Array,
) -> dict[str, Array]:
  """What is changed of one FFN, gate, up [D, F], down [F, D], threshold []; it reads x [B, T, D] where reached."""
  g, u = (project("btd,df->btf", x, w.astype(x.dtype)).astype(jnp.float32) for w in (gate, up))
  g = jnp.where(reached[..., None], g, 0)
  if "signs" in steps:
    sign = jnp.where(energy(g, -u) > energy(g, u), -1.0, 1.0)
    u, up, down = u * sign, up * sign, down * sign[:, None]
  if "norms" in steps:
    lengths = jnp.linalg.norm(down, axis=1)
    scale = jnp.where(lengths > 0, lengths / jnp.mean(lengths), 1)
    u, up, down = u * scale, up * scale, down / scale[:, None]
  hidden, found = activation(new.config.activation)(g, u), {}
  if "thresholds" in steps:
    found["threshold"] = threshold(jnp.abs(hidden), reached, zeros)
    hidden = jump(hidden, found["threshold"])
  if "refit" in steps:
    y = jnp.einsum("btf,fd->btd", activation(old.config.activation)(g, u), down, precision="highest")
    down = refitted(hidden, y, down)
  return found | {"gate": gate, "up": up, "down": down}


def energy(gate: Array, up: Array) -> Array:
  """[F]: sum over the tokens of max(0, gate)^2 max(0, up)^2."""
  return jnp.sum(jnp.square(jax.nn.relu(gate) * jax.nn.relu(up)), axis=(0, 1))


def threshold(size: Array, reached: Array, zeros: float) -> Array:
  """The largest theta, [] float32, below which is at most a share `zeros` of the entries of size [B, T, F].

  Tokens where reached [B, T] count; 0 if there are none. Found by bisection on the bits, as in tsparse/topk.py.
  """
  bits = jax.lax.bitcast_convert_type(size, jnp.int32)
  allowed = zeros * jnp.sum(reached, dtype=jnp.float32) * size.shape[-1]

  def narrow(i, theta):
    candidate = theta | (1 << (30 - i))
    below = jnp.sum((bits < candidate) & reached[..., None], axis=(0, 1), dtype=jnp.float32).sum()
    return jnp.where(below <= allowed, candidate, theta)

  found = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
  return jnp.where(jnp.any(reached), jax.lax.bitcast_convert_type(found, jnp.float32), 0)


def refitted(hidden: Array, y: Array, down: Array) -> Array:
  """down' [F, D] of hidden [B, T, F] and y [B, T, D]; `down` as it was where no token reaches the FFN. In float32."""
  moments = jnp.einsum("btf,btg->fg", hidden, hidden, precision="highest")
  with_y = jnp.einsum("btf,btd->fd", hidden, y, precision="highest")
  mean = jnp.trace(moments) / len(moments)
  solved = jnp.linalg.solve(moments + RIDGE * mean * jnp.eye(len(moments)), with_y)
  return jnp.where(mean > 0, solved, down)
