"""Log-probabilities of continuations, many rows at a time: what lm-eval's loglikelihood requests are made of.

Rows are sorted by length and padded at their end to one of a few widths, so that a program is compiled for each width
that occurs. Questions whose rows differ in the last token alone (A, B, C or D) share one row.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.models.counts import ModelCounts
from tsparse.models.loss import block_logits, by_blocks, logit_of
from tsparse.models.transformer import Transformer, head_of
from tsparse.sharding import constrain, place, replicate

Array = jax.Array
BLOCK = 16  # of T: the logits of so many tokens of each row exist at one time
NARROWEST = 32  # tokens of a row


class Row(NamedTuple):
  """Tokens the model reads; of what follows each, the last `scored` are scored: the next tokens here, then any."""

  tokens: tuple[int, ...]
  scored: int


class Score(NamedTuple):
  """Of a row: ln p of its scored tokens but the last, whether each is the likeliest, and ln p of any last one, [V]."""

  log_p: float
  greedy: bool
  last: np.ndarray


def width(length: int) -> int:
  """The tokens of the padded row: a power of two, or one and a half times one, so that a third is padding at most."""
  power = 1 << max(NARROWEST.bit_length() - 1, (length - 1).bit_length())
  return power * 3 // 4 if length <= power * 3 // 4 and power > NARROWEST else power


@functools.partial(jax.jit, static_argnums=0)
def score(
  model: Transformer, params: Any, batch: dict[str, Array], intervention: Any
) -> tuple[Array, Array, Array, ModelCounts]:
  """Scores of rows.

  Args:
    model: the decoder.
    params: its parameters.
    batch: inputs, targets, segment_ids (1, and 0 on padding), positions, scored (1 where the target counts, of which
      the last of a row is not one), each [B, T] int32.
    intervention: see Transformer.

  Returns:
    As in Score: [B] float32, [B] bool, [B, V] float32, and the counts of the hidden.
  """
  batch = {name: constrain(x, "BT") for name, x in batch.items()}
  inputs = batch["inputs"], batch["segment_ids"], batch["positions"]
  hidden, counts = model.apply({"params": params}, *inputs, intervention, logits=False)  # [B, T, D]
  head, cap = head_of(model, params), model.config.final_softcap  # [D, V]

  def of_block(head: Array, x: Array, targets: Array) -> tuple[Array, Array]:
    logits = block_logits(head, x, cap)
    return logit_of(logits, targets) - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

  log_p, likeliest = by_blocks(of_block, head, (hidden, "BTD"), (batch["targets"], "BT"), width=BLOCK)  # [B, T]
  counted = batch["scored"] > 0
  end = jnp.sum(batch["segment_ids"], axis=1) - 1  # [B]
  last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)  # [B, 1, D]
  sums = jnp.sum(log_p, axis=1, where=counted), jnp.all(likeliest | ~counted, axis=1)
  return replicate((*sums, jax.nn.log_softmax(block_logits(head, last, cap))[:, 0], counts))


def batched(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
  """Indices of the rows of each batch, the longest first, all of a batch of one width."""
  order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), rows[i].tokens))
  start = 0
  while start < len(order):
    wide = width(len(rows[order[start]].tokens))
    chosen = [i for i in order[start : start + batch_size] if width(len(rows[i].tokens)) == wide]
    yield chosen
    start += len(chosen)


def arrays(rows: Sequence[Row], batch_size: int) -> dict[str, np.ndarray]:
  """The batch of `score`; rows that are missing are padding."""
  shape = batch_size, width(max(len(row.tokens) for row in rows))
  names = "inputs", "targets", "segment_ids", "positions", "scored"
  batch = {name: np.zeros(shape, np.int32) for name in names}
  for i, (tokens, scored) in enumerate(rows):
    length = len(tokens)
    batch["inputs"][i, :length] = tokens
    batch["targets"][i, : length - 1] = tokens[1:]
    batch["segment_ids"][i, :length] = 1
    batch["positions"][i, :length] = np.arange(length)
    batch["scored"][i, length - scored : length - 1] = 1
  return batch


def scores(
  model: Transformer,
  params: Any,
  mesh: jax.sharding.Mesh,
  rows: Sequence[Row],
  batch_size: int,
  intervention: Any = None,
) -> Iterator[tuple[list[int], list[Score], ModelCounts]]:
  """Scores of all rows, batch by batch: indices, their scores, and counts of the hidden of their tokens.

  Args:
    model: the decoder.
    params: its parameters, on `mesh`.
    mesh: the devices.
    rows: in any order.
    batch_size: rows of a forward pass, a multiple of the devices.
    intervention: see Transformer; its levels are traced.
  """
  for chosen in batched(rows, batch_size):
    with jax.set_mesh(mesh):
      batch = place(arrays([rows[i] for i in chosen], batch_size), mesh)
      *found, counts = jax.tree.map(np.asarray, score(model, params, batch, intervention))
    yield chosen, [Score(*(x[i] for x in found)) for i in range(len(chosen))], counts
