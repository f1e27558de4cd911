"""Interventions on the FFN hidden, by kind of FFN: pytrees called with (gate, up, hidden, expert). Levels are traced.

Which entries of the hidden a mask keeps is a line of SELECTIONS.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, ffn_layers

Array = jax.Array

# Name -> score of the entries of the hidden [..., F], of which the absolute value counts. `norm` is ||down_i||.
SELECTIONS = {
  "hidden": lambda gate, up, hidden, norm: hidden,
  "gate": lambda gate, up, hidden, norm: gate,
  "up": lambda gate, up, hidden, norm: up,
  "contribution": lambda gate, up, hidden, norm: hidden * norm,
}

DEFINITIONS = {
  "sparsity": "share of the hidden entries of one FFN (of each routed expert) set to zero for each token: those of "
  "smallest score, exactly round(sparsity * F) of them (more where more are zero by nature); among equals the later "
  "index is dropped. Shared experts are masked only with --mask_shared: Turbo Sparse does not say whether they were",
  "selection": "the score by which entries are kept: hidden |act(gate, up)| (Turbo Sparse, arXiv 2406.05955, eq. 3-4); "
  "gate |x W_gate| and up |x W_up|, before the activation; contribution |hidden_i| * ||down_i||_2, the length of what "
  "neuron i adds to the output, with the row of its own expert",
}


def largest(x: Array, k: Array) -> Array:
  """Mask of the k largest entries of the last axis, and of zeros never; among equals the lower index is kept.

  The k-th largest value is found by bisection on the bits of the floats, 31 counting passes and no sort, and among
  equal ones the index of the last that is kept likewise. On one device it ends as soon as k entries of every row are
  above the threshold, and the index is bisected only where equal values straddle the k-th. `k` is traced.

  Args:
    x: [..., F] float32, non-negative.
    k: int32 that broadcasts to [..., 1], 0 <= k <= F.

  Returns:
    [..., F] bool; min(k, number of positive entries) of a row are true.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)  # of non-negative floats: ordered as the floats are

  def count(mask):
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

  def any_row(left):  # on several devices the question would cost more than the passes: each a collective
    mesh = jax.sharding.get_abstract_mesh()
    return jnp.any(left) if mesh.empty or mesh.size == 1 else True

  def narrow(state):  # from the highest bit down, to the largest threshold with at least k entries >= it
    i, threshold, above = state
    candidate = threshold | (1 << (30 - i))
    found = count(bits >= candidate)
    return i + 1, jnp.where(found >= k, candidate, threshold), jnp.where(found >= k, found, above)

  k = jnp.minimum(k, count(bits > 0))
  start = (0, jnp.zeros_like(k), jnp.full_like(k, x.shape[-1]))
  _, threshold, above = jax.lax.while_loop(lambda s: (s[0] < 31) & any_row(s[2] != k), narrow, start)

  def first_of_equals(_):
    equal, index = bits == threshold, jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    room, steps = k - count(bits > threshold), x.shape[-1].bit_length()  # so many of the equal ones are kept

    def narrow(i, end):  # to the largest end with at most `room` equal entries before it
      candidate = end | (1 << (steps - 1 - i))
      return jnp.where(count(equal & (index < candidate)) <= room, candidate, end)

    end = jax.lax.fori_loop(0, steps, narrow, jnp.zeros_like(threshold))
    return (bits > threshold) | (equal & (index < end))

  return jax.lax.cond(any_row(above != k), first_of_equals, lambda _: bits >= threshold, None)


def kept(sparsity: Array, neurons: int) -> Array:
  """How many of the neurons are kept at a level: neurons - round(sparsity * neurons), int32."""
  return neurons - jnp.round(sparsity * neurons).astype(jnp.int32)


@struct.dataclass
class TopK:
  """Keeps F - round(sparsity * F) entries of the hidden of each token, those of largest score, and zeroes the others.

  Turbo Sparse (arXiv 2406.05955) eq. 3-4: Mask(x) = Topk(|Combined(x)|), out = (Combined(x) * Mask(x)) W_down.

  Attributes:
    sparsity: [L] float32 in [0, 1), the slice of layer l is a scalar; or [L, E], of each expert.
    norm: ||down_i||, [L, F] float32, with experts [L, E, F]; None where the selection does not read it.
    selection: a key of SELECTIONS.
  """

  sparsity: Array
  norm: Array | None = None
  selection: str = struct.field(pytree_node=False, default="hidden")

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Masked hidden [..., F]."""
    norm = self.norm if self.norm is None or expert is None else self.norm[expert]
    score = jnp.abs(SELECTIONS[self.selection](gate, up, hidden, norm)).astype(jnp.float32)
    sparsity = self.sparsity if expert is None or not jnp.ndim(self.sparsity) else self.sparsity[expert][..., None]
    return jnp.where(largest(score, kept(sparsity, hidden.shape[-1])), hidden, 0)


def topk_everywhere(
  sparsity: float,
  config: ModelConfig,
  norms: dict[str, Array] | None = None,
  selection: str = "hidden",
  shared: bool = False,
) -> dict[str, TopK]:
  """The same level in every layer, by kind of FFN.

  Args:
    sparsity: in [0, 1).
    config: the model.
    norms: `down_norms` of its parameters, for the selections that read them.
    selection: a key of SELECTIONS.
    shared: mask the shared experts too.
  """
  layers = {kind: length for kind, length in ffn_layers(config).items() if shared or kind != "shared"}
  return {
    kind: TopK(jnp.full((length,), sparsity, jnp.float32), norms and norms[kind], selection)
    for kind, length in layers.items()
  }


def down_norms(config: ModelConfig, params: Any) -> dict[str, Array]:
  """||down_i||_2 of each neuron, float32, by kind of FFN: [L, F], of routed experts [L, E, F]."""
  ffn = params["layers"]["ffn"]
  down = {"ffn": ffn["down"]}
  if config.num_shared_experts:
    down["shared"] = ffn["shared"]["down"]
  if config.dense_layers:
    down["first"] = params["first"]["ffn"]["down"]
  return {kind: jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for kind, x in down.items()}


def check_selections(names: Sequence[str]):
  """Raises UserError for a name that is no key of SELECTIONS, with the nearest, or none at all."""
  for name in names or [""]:
    if name not in SELECTIONS:
      nearest = difflib.get_close_matches(name, SELECTIONS, n=1, cutoff=0.0)[0]
      raise UserError(
        f"--selection={','.join(names)}: {name!r} is unknown, the nearest is {nearest!r}; choose of "
        f"{', '.join(SELECTIONS)}."
      )
