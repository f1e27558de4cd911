"""A forward that shows gate, up and hidden of every FFN, token by token, to a function that makes small sums of them.

It is the model's own forward: while it is traced, the FFNs are intercepted (`nn.intercept_methods`), and the sums leave
the scan over layers beside their counts. Experts are computed by `moe_impl` "dense", every one on every token, which is
simple and exact; `reached` says which of it the model uses.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, ffn_layers
from tsparse.models.counts import ModelCounts
from tsparse.models.ffn import Intervention, ffn_input
from tsparse.models.loss import scored
from tsparse.models.router import route, router_logits
from tsparse.models.transformer import FeedForward, Transformer, token_losses
from tsparse.sharding import constrain, place, replicate

Array = jax.Array


class Seen(NamedTuple):
  """What the FFN (E = 1) or the routed experts of one layer did on a batch, in the compute dtype.

  Attributes:
    x: [B, T, D], what gate and up read.
    residual: [B, T, D], the same before the norm.
    gate: [B, T, E, F], x times the gate weights.
    up: [B, T, E, F].
    hidden: [B, T, E, F], what `down` reads.
    reached: [B, T, E] bool, the real tokens that were routed to the expert.
    down: [E, F, D].
    positions: [B, T] int32, of the tokens in their segment.
  """

  x: Array
  residual: Array
  gate: Array
  up: Array
  hidden: Array
  reached: Array
  down: Array
  positions: Array

  def count(self, mask: Array) -> Array:
    """[T] int32: how many entries of the mask [B, T, E, F] hold, of the experts that a token reached.

    By place in the row, so that int32 holds it: the host adds places up in float64.
    """
    return jnp.sum(mask & self.reached[..., None], axis=(0, 2, 3), dtype=jnp.int32)

  def count_each(self, mask: Array) -> Array:
    """[E, T] int32: the same of each expert; [E, 1], all places together, where int32 holds that."""
    counts = jnp.sum(mask & self.reached[..., None], axis=(0, 3), dtype=jnp.int32).T
    return counts if math.prod(mask.shape) // mask.shape[2] >= 1 << 31 else counts.sum(axis=1, keepdims=True)


Observe = Callable[[Seen, Any], Any]  # (seen, settings of the layer) -> sums over its tokens, a pytree of arrays


@dataclasses.dataclass(frozen=True)
class Probed:
  """Sums over a text.

  Attributes:
    nll: sum of -ln p over the scored tokens, nats.
    tokens: number of tokens scored.
    real_tokens: see `evaluate.perplexity.Evaluation`, and so is `counts`.
    counts: over the real tokens.
    sums: by kind of FFN (keys of `counts`), what `observe` returned, with a leading axis L of its own layers; float64.
  """

  nll: float
  tokens: int
  real_tokens: int
  counts: ModelCounts
  sums: dict[str, Any]

  def __add__(self, other: "Probed") -> "Probed":
    fields = [[getattr(each, f.name) for f in dataclasses.fields(each)] for each in (self, other)]
    return Probed(*jax.tree.map(np.add, *fields))


def by_kind(settings: Any, config: ModelConfig) -> dict[str, Any]:
  """A pytree with a leading axis of all layers as the kinds of FFN see it: each its own layers' part."""
  first = config.dense_layers
  head, rest = jax.tree.map(lambda x: x[:first], settings), jax.tree.map(lambda x: x[first:], settings)
  return {kind: head if kind == "first" else rest for kind in ffn_layers(config)}


def check_finite(model: Transformer, params: Any, batches: Sequence[dict[str, np.ndarray]], mesh: jax.sharding.Mesh):
  """Raises the UserError of `probe` if the loss is not finite."""
  probe(model, params, batches, mesh, lambda *_: {})


def probe(
  model: Transformer,
  params: Any,
  batches: Sequence[dict[str, np.ndarray]],
  mesh: jax.sharding.Mesh,
  observe: Observe,
  settings: dict[str, Any] | None = None,
  intervention: dict[str, Intervention] | None = None,
) -> Probed:
  """Runs the model over the batches and adds up what `observe` makes of each FFN, in memory that does not grow.

  Args:
    model: the decoder.
    params: its parameters.
    batches: as for `evaluate`.
    mesh: the devices, set by `jax.set_mesh`.
    observe: a pure function, called with each layer's FFN (its routed and its shared experts one after the other) and
      the layer's settings. One program is compiled for each such function and shape of the settings.
    settings: by kind of FFN, a pytree whose leaves have a leading axis L of its own layers. They are traced.
    intervention: optional, as a Transformer takes it; what it leaves of the hidden and of what gate and up read is
      observed.

  Raises:
    UserError: the loss is not finite.
  """
  plain = Transformer(dataclasses.replace(model.config, moe_impl="dense", remat="none"))
  total = None
  for batch in batches:
    nll, found = batch_sums(plain, observe, params, place(batch, mesh), settings or {}, intervention or {})
    if not np.isfinite(nll):
      raise UserError(_first_not_finite({kind: np.asarray(finite) for kind, (_, finite, _) in found.items()}))
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    part = Probed(
      float(nll),
      int(scored(batch).sum()),
      int((batch["segment_ids"] > 0).sum()),
      {kind: counts for kind, (counts, _, _) in found.items()},
      {kind: sums for kind, (_, _, sums) in found.items()},
    )
    total = part if total is None else total + part
  return total


def _first_not_finite(finite: dict[str, np.ndarray]) -> str:
  """The sentence that names the first layer with a false entry in finite [L], by kind of FFN."""
  of_layers = np.concatenate([finite.get("first", []), np.logical_and(finite["ffn"], finite.get("shared", True))])
  bad = np.flatnonzero(of_layers == 0)
  where = f"values in layer {bad[0]} (counted from 0) first" if bad.size else "in no layer, so the head makes them"
  return f"The model's logits are not finite: {where}; its parameters are damaged, analyse an earlier checkpoint."


@struct.dataclass
class _Probe:
  """Travels as the intervention on a kind of FFN, so that the model's scan gives it the settings of its layer."""

  settings: Any
  intervention: Any
  observe: Observe = struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def batch_sums(model, observe, params, batch, settings, intervention):
  """Of one batch the sum of -ln p, and by kind of FFN (HiddenCounts, finite [L], sums), with axis L of its layers."""
  batch = {name: constrain(x, "BT") for name, x in batch.items()}
  kinds = ffn_layers(model.config)
  probes = {kind: _Probe(settings.get(kind), intervention.get(kind), observe) for kind in kinds}
  with nn.intercept_methods(functools.partial(_intercept, batch["positions"])):
    nll, _, found = token_losses(model, params, batch, probes)
  return replicate((jnp.sum(nll, where=scored(batch)), found))


def _intercept(positions: Array, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
  """Has each FeedForward return (HiddenCounts, finite, sums) in place of the HiddenCounts of its own hidden."""
  ffn = context.module
  if not isinstance(ffn, FeedForward) or context.method_name != "__call__":
    return call(*args, **kwargs)
  bound = inspect.signature(FeedForward.__call__).bind(ffn, *args, **kwargs)
  x, residual, valid, interventions = (bound.arguments[n] for n in ("x", "residual", "valid", "interventions"))
  weights = ffn.variables["params"]
  down = weights["down"].astype(x.dtype)
  reached = valid[..., None]
  if down.ndim == 3:
    chosen, _ = route(router_logits(x, weights["router"]), valid, ffn.config.experts_per_token)  # [B, T, k]
    reached = jax.nn.one_hot(chosen, down.shape[0], dtype=jnp.bool).any(axis=2)
  watch = _Watch(interventions["ffn"], x, residual, reached, down.reshape(-1, *down.shape[-2:]), positions)
  bound.arguments["interventions"] = interventions | {"ffn": watch}
  out, counts, *rest = call(*bound.args[1:], **bound.kwargs)
  finite = jnp.all(jnp.isfinite(out) | ~valid[..., None])
  return out, counts | {"ffn": (counts["ffn"], finite, watch.sums)}, *rest


@dataclasses.dataclass
class _Watch:
  """The intervention that has an FFN observed, after the one of its probe."""

  probe: _Probe
  x: Array
  residual: Array
  reached: Array
  down: Array
  positions: Array
  sums: Any = None

  def on_input(self, x: Array) -> Array:
    self.x = ffn_input(x, self.probe.intervention)
    return self.x

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    if self.probe.intervention is not None:
      hidden = self.probe.intervention(gate, up, hidden, expert)
    whole = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (gate, up, hidden))  # a dense FFN is one expert
    seen = Seen(self.x, self.residual, *whole, self.reached, self.down, self.positions)
    self.sums = self.probe.observe(seen, self.probe.settings)
    return hidden
