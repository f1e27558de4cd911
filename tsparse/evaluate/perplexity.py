"""Loss and perplexity on held-out text, with the counts of the FFN hidden, plain or under interventions."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.models.counts import ModelCounts, fired_and_entries, model_zero_fraction
from tsparse.models.loss import scored
from tsparse.models.transformer import Transformer, token_losses
from tsparse.sharding import constrain, place, replicate

DEFINITIONS = {
  "loss": "mean of -ln p(token | the tokens before it in its document) in nats, over every token of the documents but "
  "BOS, and over their end-of-text tokens where `eos` is true; a document longer than a row is scored in pieces; of a "
  "conversation only the assistant's tokens count",
  "perplexity": "exp(loss), per token of the model's own tokenizer (bytes, for the byte vocabulary)",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Sums over a held-out text.

  Attributes:
    nll: sum of -ln p over the tokens, nats.
    tokens: number of tokens scored.
    counts: by kind of FFN, fired [L, E, F] and routed [L, E], float64 numpy arrays.
    token_nll: of each batch [B, T] float32, -ln p of its targets, 0 where there is none.
    batch_zeros: [batches, 2] float64, zeros in the hidden and all its entries.
  """

  nll: float
  tokens: int
  counts: ModelCounts
  token_nll: Sequence[np.ndarray] = ()
  batch_zeros: np.ndarray | None = None

  @property
  def loss(self) -> float:
    """Nats per token; NaN where no token was scored (conversations without an assistant's word)."""
    return self.nll / self.tokens if self.tokens else math.nan

  @property
  def perplexity(self) -> float:
    """exp(loss)."""
    return math.inf if self.loss >= 700 else math.exp(self.loss)

  @property
  def zero_fraction(self) -> float:
    """Share of zeros in the FFN hidden, over all layers."""
    return float(model_zero_fraction(self.counts))


def batch_losses(
  model: Transformer, params: Any, batch: dict[str, jax.Array], intervention: Any
) -> tuple[jax.Array, ModelCounts]:
  """-ln p of a batch's scored targets, 0 elsewhere, and the counts of its hidden. Jitted for `evaluate_each`."""
  batch = {name: constrain(x, "BT") for name, x in batch.items()}
  nll, _, counts, _ = token_losses(model, params, batch, intervention)  # [B, T]
  return replicate((jnp.where(scored(batch), nll, 0), counts))  # every host reads all of it


compiled = jax.jit(batch_losses, static_argnums=0)


def evaluate(
  model: Transformer,
  params: Any,
  batches: Sequence[dict[str, np.ndarray]],
  mesh: jax.sharding.Mesh,
  intervention: Any = None,
) -> Evaluation:
  """Loss and firing counts of a model on held-out batches, under one intervention or none; see `evaluate_each`."""
  return evaluate_each(model, params, batches, mesh, [intervention])[0]


def evaluate_each(
  model: Transformer,
  params: Any,
  batches: Sequence[dict[str, np.ndarray]],
  mesh: jax.sharding.Mesh,
  interventions: Sequence[Any],
  progress: Callable[[], None] = lambda: None,
) -> list[Evaluation]:
  """Loss and firing counts under each of some interventions, in one pass over the data.

  Args:
    model: the decoder.
    params: its parameters.
    batches: dicts of inputs, targets, segment_ids, positions, loss_mask, each [B, T] int32, all of one shape.
    mesh: the devices; it must be set by `jax.set_mesh`.
    interventions: see Transformer; None leaves the hidden alone. Those of equal structure share a compilation.
    progress: called after each forward pass, one for each batch and intervention.
  """
  nll, zeros = [[] for _ in interventions], [[] for _ in interventions]
  total: list[Any] = [None for _ in interventions]
  for batch in batches:
    placed = place(batch, mesh)
    for i, intervention in enumerate(interventions):
      losses, counts = jax.tree.map(np.asarray, compiled(model, params, placed, intervention))
      counts = jax.tree.map(lambda x: x.astype(np.float64), counts)
      fired, entries = (
        sum(x.sum() for x in part) for part in zip(*map(fired_and_entries, counts.values()), strict=True)
      )
      nll[i].append(losses)
      zeros[i].append((entries - fired, entries))
      total[i] = counts if total[i] is None else jax.tree.map(np.add, total[i], counts)
      progress()
  tokens = sum(int(scored(batch).sum()) for batch in batches)
  return [
    Evaluation(float(sum(x.sum(dtype=np.float64) for x in losses)), tokens, counts, losses, np.array(entries))
    for losses, counts, entries in zip(nll, total, zeros, strict=True)
  ]
