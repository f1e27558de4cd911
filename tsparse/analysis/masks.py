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
from tsparse.models.ffn_params import ffn_of
from tsparse.topk import kept, largest

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
  down = {kind: ffn_of(params, kind)["down"] for kind in ffn_layers(config)}
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
