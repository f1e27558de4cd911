"""Neuron predictors made: trained on what a frozen model does, or by the truncated SVD of its gate, without training.

    logits = relu(x fc1) fc2        a neuron is expected to fire where they exceed the threshold (quality.py)

Nothing is stored between the model and the training: every batch of text goes through the model once, and in each layer
(of each expert that a token reached) the labels are the entries of its hidden that are not zero. The gradient is taken
inside the layer, from what the probe of the analysis shows of it, so that memory does not grow with the layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tsparse.analysis.probe import Seen, batch_sums, probe
from tsparse.errors import RunFailure
from tsparse.models.config import ModelConfig
from tsparse.models.counts import mean_zero_fraction
from tsparse.models.transformer import Transformer
from tsparse.sharding import place

Array = jax.Array
Batch = dict[str, np.ndarray]
INPUTS = ("before_norm", "after_norm")
MULTIPLE = 8  # of a rank
LEAST = 0.005  # added to the weight of negatives, as Deja Vu does: a layer may have no positives

DEFINITIONS = {
  "training": "binary cross-entropy of sigmoid(logits) with the label hidden != 0, mean over the entries of the tokens "
  "that reached the expert; a negative weighs the layer's share of positives + 0.005, a positive 1 (Deja Vu, arXiv "
  "2310.17157; the same code trained ProSparse's predictors)",
  "rank": "of layer l: budget * 3 D F / (D + F) * (1 - zeros_l) / mean over layers of (1 - zeros), rounded to a "
  "multiple of 8, at least 8 and at most D: predictors hold `budget` of the FFN's weights (TurboSparse-Mistral: "
  "0.13, -Mixtral: 0.11), and less sparse layers more of them (PowerInfer, arXiv 2312.12456)",
  "svd": "no training: the gate of rank r nearest to the layer's, V V^T gate with V its r leading left singular "
  "vectors, which reads as many weights as the trained predictor; for lack of a ReLU it is laid out twice as wide, "
  "x = relu(x) - relu(-x)",
}


@dataclasses.dataclass(frozen=True)
class Survey:
  """What a look at some batches says of the layers, each [L].

  Attributes:
    zeros: share of zeros in the hidden.
    rms: root mean square by name: of what predictors may read ("before_norm", "after_norm") and of "gate".
  """

  zeros: np.ndarray
  rms: dict[str, np.ndarray]


def read(seen: Seen, source: str) -> Array:
  """What predictors read, [B, T, D] float32."""
  return (seen.residual if source == "before_norm" else seen.x).astype(jnp.float32)


def squares(seen: Seen, settings: Any) -> dict[str, Array]:
  """Sums of squares over the entries of the tokens, with their number (each in float32)."""
  del settings
  token = seen.reached.any(-1)[..., None]

  def of(x: Array, where: Array) -> Array:
    where = jnp.broadcast_to(where, x.shape)
    return jnp.stack([jnp.sum(jnp.square(x.astype(jnp.float32)), where=where), jnp.sum(where, dtype=jnp.float32)])

  parts = {name: of(read(seen, name), token) for name in INPUTS}
  return parts | {"gate": of(seen.gate, seen.reached[..., None])}


def survey(model: Transformer, params: Any, batches: Sequence[Batch], mesh: jax.sharding.Mesh) -> Survey:
  """Looks at the model on some batches; UserError where its loss is not finite."""
  probed = probe(model, params, batches, mesh, squares)
  rms = {name: np.sqrt(total[:, 0] / np.maximum(total[:, 1], 1)) for name, total in probed.sums["ffn"].items()}
  return Survey(np.asarray(mean_zero_fraction(probed.counts["ffn"], 1)), rms)


def choose_ranks(zeros: np.ndarray, config: ModelConfig, budget: float) -> tuple[int, ...]:
  """The rank of each layer's predictor, of its share of zeros [L]; see DEFINITIONS."""
  width = 3 * config.d_model * config.d_ff / (config.d_model + config.d_ff)
  fires = np.maximum(1 - zeros, 1e-3)
  ranks = MULTIPLE * np.rint(budget * width * fires / fires.mean() / MULTIPLE)
  return tuple(int(rank) for rank in np.clip(ranks, MULTIPLE, max(MULTIPLE, config.d_model)))


def initial(key: Array, config: ModelConfig, ranks: Sequence[int], rms: np.ndarray) -> dict[str, Array]:
  """fc1 and fc2 as models/transformer.py lays them out, random: relu(x fc1) is of size 1 where x is of size rms [L].

  What lies beyond the rank of a layer is 0 and stays 0: neither relu(0) nor its gradient is anything else.
  """
  stack = (config.num_layers, config.num_experts) if config.num_experts else (config.num_layers,)
  dim, width, rank = config.d_model, config.d_ff, max(ranks)
  of_layer = lambda x: jnp.asarray(x, jnp.float32).reshape(-1, *(1,) * len(stack))  # noqa: E731
  inside = (jnp.arange(rank) < jnp.asarray(ranks)[:, None]).reshape(-1, *(1,) * len(stack), rank)  # [L, (1,) 1, R]
  one, two = jax.random.split(key)
  fc1 = jax.random.normal(one, (*stack, dim, rank)) / (dim**0.5 * of_layer(np.maximum(rms, 1e-6))[..., None])
  fc2 = jax.random.normal(two, (*stack, rank, width)) / of_layer(np.sqrt(ranks))[..., None]
  return {"fc1": fc1 * inside, "fc2": fc2 * jnp.swapaxes(inside, -1, -2)}


def logits_of(x: Array, fc1: Array, fc2: Array) -> Array:
  """x [B, T, D], fc1 [D, R], fc2 [R, F], or [E, D, R] and [E, R, F] -> [B, T, E, F], E = 1 where there is none.

  In float32 on TPUs too, as decoding computes them, which compares them with the thresholds that are chosen here.
  """
  fc1, fc2 = (w.reshape(-1, *w.shape[-2:]) for w in (fc1, fc2))
  inner = jax.nn.relu(jnp.einsum("btd,edr->bter", x, fc1, precision="highest"))
  return jnp.einsum("bter,erf->btef", inner, fc2, precision="highest")


def weighted_loss(logits: Array, fired: Array, reached: Array, negative: Array) -> Array:
  """The loss of DEFINITIONS.

  Args:
    logits: [B, T, E, F].
    fired: [B, T, E, F] bool, the labels.
    reached: [B, T, E] bool, the tokens of each expert.
    negative: [] what a negative weighs.
  """
  losses = jnp.where(fired, jax.nn.softplus(-logits), negative * jax.nn.softplus(logits))
  entries = jnp.maximum(jnp.sum(reached, dtype=jnp.float32) * logits.shape[-1], 1)
  return jnp.sum(losses, where=reached[..., None]) / entries


@dataclasses.dataclass(frozen=True)
class Gradient:
  """Observes loss and gradient of a layer's predictors, whose weights and weight of negatives are the settings.

  Attributes:
    source: one of INPUTS.
  """

  source: str

  def __call__(self, seen: Seen, settings: tuple[dict[str, Array], Array]) -> tuple[Array, dict[str, Array]]:
    """[] and a tree like the weights."""
    weights, negative = settings
    x, fired = read(seen, self.source), seen.hidden != 0
    return jax.value_and_grad(lambda w: weighted_loss(logits_of(x, **w), fired, seen.reached, negative))(weights)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def descend(model, tx, source, weights, state, params, batch, negative):
  """One step on one batch: weights, state of the optimizer, and the loss of each layer [L]."""
  _, found = batch_sums(model, Gradient(source), params, batch, {"ffn": (weights, negative)}, {})
  _, _, (losses, gradient) = found["ffn"]
  updates, state = tx.update(gradient, state, weights)
  return optax.apply_updates(weights, updates), state, losses


def train(
  model: Transformer,
  params: Any,
  batches: Iterator[Batch],
  mesh: jax.sharding.Mesh,
  found: Survey,
  ranks: Sequence[int],
  source: str,
  *,
  steps: int,
  learning_rate: float,
  seed: int = 0,
  progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Array], list[float]]:
  """Trains a predictor for each layer (and expert) of a frozen model.

  AdamW as Deja Vu and ProSparse have it (weight decay 0.01), on whole batches of the text, warm-up and cosine.

  Args:
    model: the decoder; its layers are equal.
    params: its parameters.
    batches: of text, one for each step.
    mesh: the devices, set by `jax.set_mesh`.
    found: of the model.
    ranks: of each layer.
    source: one of INPUTS.
    steps: how many.
    learning_rate: its peak.
    seed: of the initial weights.
    progress: called with a line after each step.

  Returns:
    fc1 and fc2, see `initial`, and the mean loss of the layers at each step.

  Raises:
    RunFailure: the loss is not finite.
  """
  plain = Transformer(dataclasses.replace(model.config, moe_impl="dense", remat="none"))
  weights = initial(jax.random.key(seed), model.config, ranks, found.rms[source])
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps, learning_rate / 100)
  tx = optax.adamw(schedule, weight_decay=0.01)
  state, losses = tx.init(weights), []
  negative = jnp.asarray(1 - found.zeros + LEAST, jnp.float32)
  for step in range(steps):
    batch = place(next(batches), mesh)
    weights, state, of_layers = descend(plain, tx, source, weights, state, params, batch, negative)
    losses.append(float(of_layers.mean()))
    if not np.isfinite(losses[-1]):
      raise RunFailure(f"the loss of the predictors is {losses[-1]} at step {step + 1}: lower --learning_rate.")
    progress(f"loss {losses[-1]:.4f}")
  return weights, losses


def svd_of_gate(gate: np.ndarray, ranks: Sequence[int], rms: np.ndarray) -> dict[str, np.ndarray]:
  """The predictors of DEFINITIONS' "svd", which read x after its norm; logits have a root mean square near 4.

  Args:
    gate: [L, D, F] or [L, E, D, F].
    ranks: r of each layer.
    rms: [L], of x gate.

  Returns:
    fc1 [..., D, 2 max(ranks)] and fc2 [..., 2 max(ranks), F].
  """
  *stack, dim, width = gate.shape
  rank = max(ranks)
  fc1, fc2 = np.zeros((*stack, dim, 2 * rank), np.float32), np.zeros((*stack, 2 * rank, width), np.float32)
  for index in np.ndindex(*stack):
    w, r = np.asarray(gate[index], np.float64), min(ranks[index[0]], dim)
    left = np.linalg.eigh(w @ w.T)[1][:, -r:]  # [D, r], of the largest: they are singular values squared
    rows = left.T @ w * (4 / max(rms[index[0]], 1e-6))
    fc1[index][:, : 2 * r] = np.concatenate([left, -left], 1)
    fc2[index][: 2 * r] = np.concatenate([rows, -rows], 0)
  return {"fc1": fc1, "fc2": fc2}
