"""The masked-perplexity curves of a model, with as few forward passes as their definition allows.

A top-k mask of level s changes nothing where each token's hidden has at least round(s F) zeros by nature. The forward
pass of the model as it is says of each row the most entries that fired for any of its tokens in any layer, so it is
known exactly which rows a level leaves as they are. They are not run again: their losses are those of the model as it
is. The other rows are put together in batches of their own. Level 0 masks nothing and is run for no row.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tsparse.analysis.masks import topk_everywhere
from tsparse.evaluate.perplexity import Evaluation, losses
from tsparse.models.config import ModelConfig
from tsparse.models.transformer import Transformer
from tsparse.sharding import place
from tsparse.topk import kept

Batch = Mapping[str, np.ndarray]


def changed_rows(
  level: float, selection: str, natural: Evaluation, config: ModelConfig, mask_shared: bool = False
) -> np.ndarray:
  """[rows] bool: the rows of the evaluated batches in which the mask may change an entry of the hidden.

  Exact for a model without experts. With experts a token's entries of all the experts that it reached are counted
  together, so that some rows may be run which the mask would have left alone.
  """
  rows = len(natural.rows.nll)
  if level == 0:
    return np.zeros(rows, bool)
  if selection != "hidden":  # what another score drops may be no zero of the hidden
    return np.ones(rows, bool)
  changed = np.zeros(rows, bool)
  for kind, most in natural.rows.most.items():
    if kind != "shared" or mask_shared:
      changed |= most > int(kept(np.float32(level), natural.counts[kind].fired.shape[-1]))
  return changed


def masked_curves(
  model: Transformer,
  params: Any,
  batches: Sequence[Batch],
  mesh: jax.sharding.Mesh,
  natural: Evaluation,
  levels: Sequence[float],
  selections: Sequence[str] = ("hidden",),
  norms: Mapping[str, jax.Array] | None = None,
  mask_shared: bool = False,
  progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
  """The "curves" of a model: of each selection the "points", each with "sparsity", "loss" and "perplexity".

  Args:
    model: the decoder.
    params: its parameters.
    batches: as for `evaluate_each`.
    mesh: the devices, set by `jax.set_mesh`.
    natural: the model as it is on the same batches.
    levels: sparsities in [0, 1).
    selections: keys of masks.SELECTIONS.
    norms: `masks.down_norms`, for the selection that reads them.
    mask_shared: mask shared experts too.
    progress: called for each batch and level above 0, when it is done or was spared.
  """
  masks, changed, pending = {}, {}, {}
  for point in ((selection, level) for selection in selections for level in levels):
    selection, level = point
    of_selection = norms if selection == "contribution" else None
    masks[point] = topk_everywhere(level, model.config, of_selection, selection, mask_shared)
    changed[point] = changed_rows(level, selection, natural, model.config, mask_shared)
    pending[point] = []  # changed rows of batches that have others too
  nll = {point: natural.rows.nll[~rows].sum() for point, rows in changed.items()}
  size = len(batches[0]["targets"]) if len(batches) else 0

  def add(point: tuple[str, float], placed: Mapping[str, jax.Array]):
    nll[point] += np.asarray(losses(model, params, placed, masks[point])).sum(dtype=np.float64)

  for number, batch in enumerate(batches):
    placed = None
    for point, rows in changed.items():
      here = np.flatnonzero(rows[number * size : (number + 1) * size])
      if len(here) == size:
        placed = placed or place(batch, mesh)
        add(point, placed)
      else:
        pending[point] += [{name: x[row] for name, x in batch.items()} for row in here]
        for whole in _taken(pending[point], size, last=number == len(batches) - 1):
          add(point, place(whole, mesh))
      if point[1] > 0:
        progress()
  found = {point: dataclasses.replace(natural, nll=float(total)) for point, total in nll.items()}
  return [
    {
      "selection": selection,
      "points": [{"sparsity": s, "loss": (e := found[selection, s]).loss, "perplexity": e.perplexity} for s in levels],
    }
    for selection in selections
    if levels
  ]


def _taken(rows: list[Batch], size: int, last: bool) -> Iterator[Batch]:
  """Whole batches of the first rows, taken off the list; if `last` of all of them, with empty rows at the end."""
  while len(rows) >= size or (last and rows):
    some, rows[:] = rows[:size], rows[size:]
    empty = {name: np.zeros_like(x) for name, x in some[0].items()}
    some += [empty] * (size - len(some))
    yield {name: np.stack([row[name] for row in some]) for name in empty}
