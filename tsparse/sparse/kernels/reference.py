"""What the kernels of decoding compute, in jnp: their oracle, and what runs where there are none.

Weights are float32 or bfloat16 and lie in rows, as `tsparse/sparse/layout.py` says; products are taken and added up in
float32. A kernel may skip what these functions multiply by zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsparse.activations import Activation
from tsparse.models.ffn import Intervention, gated_hidden
from tsparse.models.layers import softcap
from tsparse.models.predictor import predict

Array = jax.Array
# Which rows of an FFN are read:
#   off        all
#   exact      gate of all neurons, up where the gate lets anything through, down where the hidden is not zero
#   predictor  the predictor first, then as `exact` where it expects a non-zero entry
MODES = ("off", "exact", "predictor")


class Neurons(NamedTuple):
  """Weights of E experts (one, where there are none), a row for each neuron: gate, up, down [E, F, D]."""

  gate: Array
  up: Array
  down: Array


class Predictor(NamedTuple):
  """One predictor for each expert (models/predictor.py), fc1 [E, R, D] and fc2 [E, F, R], and their input x [n, D].

  Logits must exceed `threshold` [E] float32; None is 0.
  """

  fc1: Array
  fc2: Array
  x: Array
  threshold: Array | None = None


def place(neurons: Neurons) -> Neurons:
  """The weights in the shape that the kernels read; a module of kernels has its own, or this one."""
  return neurons


def linear(x: Array, w: Array) -> Array:
  """x w^T: x [n, D] float32, w [out, D] -> [n, out] float32."""
  return jnp.einsum("nd,fd->nf", x, w.astype(jnp.float32), precision="highest")


def feed_forward(
  mode: str,
  activation: Activation,
  x: Array,
  chosen: Array,
  weights: Array,
  neurons: Neurons,
  predictor: Predictor | None = None,
  intervene: Intervention | None = None,
) -> tuple[Array, Array]:
  """sum over the chosen experts e of weight_e down_e(act(gate_e x, up_e x)), the hidden masked by a predictor if given.

  Args:
    mode: one of MODES; the numbers are the same whatever it is.
    activation: a row of the table of activations.
    x: [n, D] float32.
    chosen: [n, k] int32, different experts for each row; E is nobody.
    weights: [n, k] float32.
    neurons: the experts.
    predictor: optional.
    intervene: optional change of the hidden; kernels that skip know none.

  Returns:
    [n, D] float32, and [n] float32: entries of the hidden that are not zero, over the chosen experts.
  """
  del mode

  def add(total: tuple[Array, Array], expert: tuple) -> tuple[tuple[Array, Array], None]:
    index, (gate, up, down), fc = expert
    weight = jnp.sum(weights, axis=-1, where=chosen == index)  # [n]
    here = jnp.any(chosen == index, axis=-1)  # [n]

    def compute(out: Array, fired: Array) -> tuple[Array, Array]:
      predicted = None
      if fc is not None:
        *fc1_fc2, threshold = fc
        fc1, fc2 = (w.astype(jnp.float32) for w in fc1_fc2)
        predicted = predict(predictor.x[None], fc1.T, fc2.T, threshold)[0]  # [n, F]
      hidden = gated_hidden(linear(x, gate), linear(x, up), activation, predicted, intervene, index)
      out += weight[:, None] * jnp.einsum("nf,fd->nd", hidden, down.astype(jnp.float32), precision="highest")
      return out, fired + here * jnp.sum(hidden != 0, axis=1, dtype=jnp.float32)

    return jax.lax.cond(jnp.any(here), compute, lambda *total: total, *total), None

  fc = None if predictor is None else (predictor.fc1, predictor.fc2, predictor.threshold)
  experts = jnp.arange(neurons.gate.shape[0]), neurons, fc
  return jax.lax.scan(add, (jnp.zeros_like(x), jnp.zeros(len(x))), experts)[0]


def attend(
  query: Array, key: Array, value: Array, positions: Array, window: int, scale: float, cap: float = 0.0
) -> Array:
  """softmax(softcap(scale q k^T)) v over the slots s of a cache with s <= position < s + window.

  Args:
    query: [B, T, N, H] float32; query head n uses kv head n // (N/K).
    key: [B, K, S, H].
    value: [B, K, S, H].
    positions: [B, T] int32, the slot of each query.
    window: 0 is none.
    scale: of the scores.
    cap: see `softcap`; 0 is none.

  Returns:
    [B, T, N, H] float32.
  """
  batch, time, heads, size = query.shape
  distance = positions[..., None] - jnp.arange(key.shape[2])  # [B, T, S]
  seen = (distance >= 0) & (distance < window) if window else distance >= 0
  grouped = query.reshape(batch, time, key.shape[1], -1, size)  # [B, T, K, N/K, H]
  scores = softcap(scale * jnp.einsum("btkgh,bksh->bkgts", grouped, key, precision="highest"), cap)
  shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
  mixed = jnp.einsum("bkgts,bksh->btkgh", shares, value, precision="highest")
  return mixed.reshape(batch, time, heads, size)
