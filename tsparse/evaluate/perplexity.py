"""Loss and perplexity on held-out text, with the counts of the FFN hidden, plain or under interventions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.models.counts import ModelCounts, model_zero_fraction
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
  """

  nll: float
  tokens: int
  counts: ModelCounts

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


def batch_sums(
  model: Transformer, params: Any, batch: dict[str, jax.Array], intervention: Any
) -> tuple[jax.Array, ModelCounts]:
  """Sum of -ln p over the scored tokens of a batch, and the counts of its hidden. Traced under `evaluate`'s jit."""
  batch = {name: constrain(x, "BT") for name, x in batch.items()}
  nll, _, counts, _ = token_losses(model, params, batch, intervention)  # [B, T]
  return replicate((jnp.sum(nll, where=scored(batch)), counts))  # every host reads all of it


compiled = jax.jit(batch_sums, static_argnums=0)


def evaluate(
  model: Transformer,
  params: Any,
  batches: Sequence[dict[str, np.ndarray]],
  mesh: jax.sharding.Mesh,
  intervention: Any = None,
) -> Evaluation:
  """Loss and firing counts of a model on held-out batches.

  Args:
    model: the decoder.
    params: its parameters.
    batches: dicts of inputs, targets, segment_ids, positions, loss_mask, each [B, T] int32, all of one shape.
    mesh: the devices; it must be set by `jax.set_mesh`.
    intervention: see Transformer; None leaves the hidden alone.
  """
  nll, tokens, total = 0.0, 0, None
  for batch in batches:
    batch_nll, counts = compiled(model, params, place(batch, mesh), intervention)
    nll += float(batch_nll)
    tokens += int(scored(batch).sum())
    counts = jax.tree.map(lambda x: np.asarray(x, np.float64), counts)
    total = counts if total is None else jax.tree.map(np.add, total, counts)
  return Evaluation(nll, tokens, total)
