"""Loss and perplexity on held-out text, with the counts of the FFN hidden, plain or under interventions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.models.counts import ModelCounts, fired_and_entries, model_zero_fraction
from tsparse.models.loss import scored
from tsparse.models.transformer import Transformer, token_losses
from tsparse.sharding import constrain, place, replicate

DEFINITIONS = {
  "loss": "mean of -ln p(token | the tokens before it in its document) in nats, over every token of the documents "
  "after BOS (after their first, where `bos` is false), and over their end-of-text tokens where `eos` is true; a "
  "document longer than a row is scored in pieces; of a conversation only the assistant's tokens count",
  "perplexity": "exp(loss), per token of the model's own tokenizer (bytes, for the byte vocabulary)",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Sums over a held-out text.

  Attributes:
    nll: sum of -ln p over the tokens, nats.
    tokens: number of tokens scored, over which the loss is.
    real_tokens: number of all tokens but padding, scored or not, over which the counts are.
    counts: by kind of FFN, fired [L, E, F] and routed [L, E], float64 numpy arrays.
    documents: sums over each document, if asked for.
    rows: what is known of each row of the batches.
  """

  nll: float
  tokens: int
  real_tokens: int
  counts: ModelCounts
  documents: "Documents | None" = None
  rows: "Rows | None" = None

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


class Rows(NamedTuple):
  """Of each row of the batches, one batch after the other.

  Attributes:
    nll: [rows] float64, sum of -ln p of the scored targets, nats.
    most: by kind of FFN [rows], the most entries of a token's hidden that fired in any layer, of all the experts that
      the token reached.
  """

  nll: np.ndarray
  most: dict[str, np.ndarray]


class Documents:
  """Sums over the tokens of each document, added up batch by batch: memory is that of the documents, not the tokens.

  Attributes:
    sums: [documents, 4] float64: -ln p of the scored targets (nats), their number, and zeros and entries of the hidden
      of all tokens.
  """

  def __init__(self, documents: int):
    self.sums = np.zeros((documents, 4))

  def add(self, ids: np.ndarray, nll: np.ndarray, scored: np.ndarray, fired: np.ndarray, entries: float):
    """Adds a batch.

    Args:
      ids: [B, T] int32, the document of each token, -1 on padding.
      nll: [B, T], -ln p of the targets.
      scored: [B, T] bool, which targets count.
      fired: [B, T], non-zero entries in the hidden of each token.
      entries: of the hidden of a token.
    """
    real = ids >= 0
    if not real.any():
      return
    first = ids[real].min()  # a batch holds documents that follow each other
    columns = np.where(scored, nll, 0)[real], scored[real], entries - fired[real], np.full(real.sum(), entries)
    for column, values in enumerate(columns):
      added = np.bincount(ids[real] - first, values)
      self.sums[first : first + len(added), column] += added


def batch_losses(
  model: Transformer, params: Any, batch: dict[str, jax.Array], intervention: Any
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], ModelCounts]:
  """Of a batch: -ln p of its scored targets (0 elsewhere) and the entries of each token's hidden that fired, [B, T]
  float32 each, those of the row's widest token by kind of FFN [B], and the counts. Jitted for `evaluate_each`."""
  batch = {name: constrain(x, "BT") for name, x in batch.items()}
  nll, _, counts = token_losses(model.clone(by_token=True), params, batch, intervention)  # [B, T]
  fired = sum(c.by_token.sum(0) for c in counts.values())  # of all layers
  most = {kind: c.by_token.max((0, 2)) for kind, c in counts.items()}
  counts = {kind: c.replace(by_token=None) for kind, c in counts.items()}
  return replicate((jnp.where(scored(batch), nll, 0), fired, most, counts))  # every host reads all of it


compiled = jax.jit(batch_losses, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def losses(model: Transformer, params: Any, batch: dict[str, jax.Array], intervention: Any) -> jax.Array:
  """[B, T] float32: -ln p of the scored targets of a batch, 0 elsewhere; nothing is counted."""
  batch = {name: constrain(x, "BT") for name, x in batch.items()}
  nll, _, _ = token_losses(model, params, batch, intervention)
  return replicate(jnp.where(scored(batch), nll, 0))


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
  document_ids: Sequence[np.ndarray] = (),
  documents: int = 0,
) -> list[Evaluation]:
  """Loss and firing counts under each of some interventions, in one pass over the data.

  Args:
    model: the decoder.
    params: its parameters.
    batches: dicts of inputs, targets, segment_ids, positions, loss_mask, each [B, T] int32, all of one shape.
    mesh: the devices; it must be set by `jax.set_mesh`.
    interventions: see Transformer; None leaves the hidden alone. Those of equal structure share a compilation.
    progress: called after each forward pass, one for each batch and intervention.
    document_ids: of each batch [B, T], the document of each target, -1 on padding.
    documents: how many there are; 0 for no sums over documents.
  """
  total: list[Any] = [None for _ in interventions]
  sums = [Documents(documents) if documents else None for _ in interventions]
  rows: list[list[Rows]] = [[] for _ in interventions]
  for number, batch in enumerate(batches):
    placed, counted, real = place(batch, mesh), scored(batch), int((batch["segment_ids"] > 0).sum())
    for i, intervention in enumerate(interventions):
      nll, fired, most, counts = jax.tree.map(np.asarray, compiled(model, params, placed, intervention))
      counts = jax.tree.map(lambda x: x.astype(np.float64), counts)
      if documents:
        entries = sum(fired_and_entries(c)[1].sum() for c in counts.values()) / max(real, 1)  # of each token
        sums[i].add(document_ids[number], nll, counted, fired, entries)
      rows[i].append(Rows(nll.sum(1, dtype=np.float64), most))
      part = nll.sum(dtype=np.float64), int(counted.sum()), real, counts
      total[i] = part if total[i] is None else jax.tree.map(np.add, total[i], part)
      progress()
  whole = [jax.tree.map(lambda *x: np.concatenate(x), *of_each) for of_each in rows]
  return [
    Evaluation(float(nll), int(tokens), int(real), counts, of_documents, of_rows)
    for (nll, tokens, real, counts), of_documents, of_rows in zip(total, sums, whole, strict=True)
  ]
