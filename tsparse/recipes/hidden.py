"""The intervention on the FFN hidden in training: another activation on the way, and the penalty that is summed up."""

import jax
from flax import struct

from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.recipes.penalties import PENALTIES
from tsparse.recipes.swap import WAYS

Array = jax.Array


@struct.dataclass
class Train:
  """See models/ffn.py, Intervention.

  Attributes:
    share: of the way to the activation `act`, [L] float32; None where it is there from the start.
    act: a key of swap.WAYS.
    kind: the penalty, a key of PENALTIES; "" for none.
    scale: of that penalty.
  """

  share: Array | None = None
  act: str = struct.field(pytree_node=False, default="")
  kind: str = struct.field(pytree_node=False, default="")
  scale: float = struct.field(pytree_node=False, default=1.0)

  elementwise = True  # no entry depends on the others of its row: neurons may be split over devices

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Hidden [..., F]."""
    del expert
    return hidden if self.share is None else WAYS[self.act](gate, up, self.share)

  @property
  def penalty(self):
    """hidden [..., F] -> penalty of each entry [..., F]; None where there is no penalty."""
    return (lambda hidden: PENALTIES[self.kind](hidden, self.scale)) if self.kind else None


def everywhere(config: ModelConfig, share: Array | None, kind: str, scale: float) -> dict[str, Train]:
  """The same in every layer, by kind of FFN."""
  full = lambda length: None if share is None else jax.numpy.full((length,), share)  # noqa: E731
  return {name: Train(full(length), config.activation, kind, scale) for name, length in ffn_layers(config).items()}
