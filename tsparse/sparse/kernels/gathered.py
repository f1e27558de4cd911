"""The FFN of decoding on listed rows, for accelerators: which rows are worth reading is decided between two kernels.

    off         all neurons of the chosen experts
    exact       gate of all these -> those that let anything through are listed -> up of the listed -> those whose
                hidden is not zero are listed -> down of the listed
    predictor   the predictor's mask -> the neurons it expects are listed -> gate, up and down of the listed

A list has a fixed length, that of all the neurons, since shapes are static, and a count: beyond it nothing is read.
What reads the rows is given as `Rows`, by tpu.py or gpu.py. The oracle is reference.feed_forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsparse.activations import Activation
from tsparse.sparse.kernels import reference
from tsparse.sparse.kernels.reference import Neurons, Predictor

Array = jax.Array
MOST = 8  # tokens of a batch that decodes; the rows that any of more (a prompt) needs are nearly all


class Rows(NamedTuple):
  """What reads listed rows of weights w [E, F, D], in whatever shape the kernels keep them.

  Attributes:
    dot: (w, rows [M] int32, count [] int32, x [n, D] float32, block) -> [n, M block] float32, products with the neurons
      r block ... (r + 1) block - 1 of E F for each r of rows; those beyond the count have no meaning.
    add: (w, rows, count, h [n, M block] float32, block) -> [n, D] float32, the sum of those neurons, weighted by h,
      which is 0 beyond the count.
  """

  dot: Callable[[Array, Array, Array, Array, int], Array]
  add: Callable[[Array, Array, Array, Array, int], Array]


def feed_forward(
  kernel: Rows,
  mode: str,
  activation: Activation,
  x: Array,
  chosen: Array,
  weights: Array,
  neurons: Neurons,
  predictor: Predictor | None,
  block: int,
) -> tuple[Array, Array]:
  """See reference.feed_forward; `block` divides F: so many rows are read together where all are."""
  experts, width = neurons.gate.shape[:2]
  index = jnp.unique(chosen, size=min(experts, chosen.size), fill_value=experts)  # [J], nobody comes last
  here = (chosen[..., None] == index) & (index < experts)  # [n, k, J]
  # The M = J F candidates: who is routed there and by what weight [n, M], and which they are of E F [M].
  wanted = jnp.repeat(here.any(1), width, axis=1)
  share = jnp.repeat(jnp.sum(weights[..., None], axis=1, where=here), width, axis=1)
  first = jnp.minimum(index, experts - 1)
  number = (first[:, None] * width + jnp.arange(width)).reshape(-1)
  at = jnp.arange(len(number))
  if predictor is not None:
    wanted &= jnp.concatenate([_predicted(predictor, expert) for expert in first], axis=1)

  def listed(live: Array) -> tuple[Array, Array]:  # [n, M] -> [M], those that any token wants first, and how many
    places = jnp.sort(jnp.where(live.any(0), at, len(at)))
    return jnp.minimum(places, len(at) - 1), jnp.sum(places < len(at), dtype=jnp.int32)

  blocks = (first[:, None] * (width // block) + jnp.arange(width // block)).reshape(-1)
  every = jnp.sum(index < experts, dtype=jnp.int32) * (width // block)
  if mode == "off":
    gate, up = (kernel.dot(w, blocks, every, x, block) for w in (neurons.gate, neurons.up))
    hidden = jnp.where(wanted, activation(gate, up), 0)  # [n, M]
    out = kernel.add(neurons.down, blocks, every, hidden * share, block)
    return out, jnp.sum(hidden != 0, axis=1, dtype=jnp.float32)
  if mode == "predictor" and predictor is not None:
    places, count = listed(wanted)
    gate, up = (kernel.dot(w, number[places], count, x, 1) for w in (neurons.gate, neurons.up))
  else:
    gate = kernel.dot(neurons.gate, blocks, every, x, block)
    places, count = listed(wanted & (activation(gate, jnp.ones_like(gate)) != 0))
    gate, up = gate[:, places], kernel.dot(neurons.up, number[places], count, x, 1)
  hidden = jnp.where(wanted[:, places] & (at < count), activation(gate, up), 0)  # [n, M], of those listed
  if mode == "exact" or predictor is None:
    again, count = listed(hidden != 0)
    hidden, places = jnp.where(at < count, hidden[:, again], 0), places[again]
  out = kernel.add(neurons.down, number[places], count, hidden * share[:, places], 1)
  return out, jnp.sum(hidden != 0, axis=1, dtype=jnp.float32)


def _predicted(predictor: Predictor, expert: Array) -> Array:
  """[n, F] bool of one expert; predictors are read whole, by XLA."""
  fc1, fc2 = (jax.lax.dynamic_index_in_dim(fc, expert, keepdims=False) for fc in (predictor.fc1, predictor.fc2))
  threshold = 0 if predictor.threshold is None else predictor.threshold[expert]
  return reference.linear(jax.nn.relu(reference.linear(predictor.x, fc1)), fc2) > threshold
