"""Models of published shapes with random weights whose zeros are known, for benchmarks of decoding.

A token's class, which channels of its embedding say, decides which share of the neurons fires; the gate alone is
positive for more, at random; the predictors, of the rank published for the model, read the class. All else in them is
noise, read and multiplied like any weight. So the sparsity is what it is said to be and the predictors are right. What
the layers add stays a fraction of the embedding, or the class would fade with depth, and more and more neurons fire.
"""

import dataclasses
import functools
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tsparse.models.config import PRESETS, ModelConfig
from tsparse.sparse.kernels.reference import Neurons


@dataclasses.dataclass(frozen=True)
class Shape:
  """A published model, and its sparsity in twentieths of the neurons; see the paper's section 6 for the ranks."""

  preset: str
  firing: int  # twentieths of the neurons that fire
  gates: float  # share of the gates that are positive: the square root of that of the neurons, as for dReLU
  rank: int

  @property
  def share(self) -> float:
    """Of the neurons, that fires."""
    return self.firing / CLASSES


KNOWN = {
  "mistral": Shape("mistral_7b", firing=2, gates=0.316, rank=1260),
  "mistral_512": Shape("mistral_7b", firing=2, gates=0.316, rank=512),
  "mixtral": Shape("mixtral_8x7b", firing=3, gates=0.387, rank=1036),
  "tiny": Shape("tiny", firing=2, gates=0.316, rank=24),  # says nothing about speed: for tests, as the next
  "tiny_moe": Shape("tiny_moe", firing=3, gates=0.387, rank=24),
}
CLASSES = 20
LOUD = 8.0  # the channels that are no noise: 0 is the same for all tokens, 1 + c says that the class is c
POOL = 2**24 - 3  # random numbers; a prime length, so that rows differ


@functools.cache
def pool() -> np.ndarray:
  """[POOL] bfloat16, normal."""
  return np.random.default_rng(0).standard_normal(POOL, np.float32).astype(ml_dtypes.bfloat16)


def noise(scale: float, *shape: int) -> np.ndarray:
  """Array of `shape`, bfloat16, normal with that standard deviation."""
  return np.resize((pool().astype(np.float32) * scale).astype(pool().dtype), shape)


def decoder_of(shape: Shape, layers: int) -> tuple[ModelConfig, dict[str, Any]]:
  """The model's config, and its parameters in the layout of tsparse/sparse/layout.py."""
  config = dataclasses.replace(
    PRESETS[shape.preset],
    num_layers=layers,
    activation="drelu",
    dtype="float32",
    predictor_ranks=(shape.rank,) * layers,
    predictor_input="after_norm",
  )
  dim, width, rank, experts = config.d_model, config.d_ff, shape.rank, max(1, config.num_experts)
  heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  group = np.random.default_rng(1).permutation(width) % CLASSES  # [F]
  fires = (group[:, None] - np.arange(CLASSES)) % CLASSES < shape.firing  # [F, class]
  loud = slice(1 + CLASSES)
  unit = dim**-0.5  # of the weights of a product that has variance 1
  cold = NormalDist().inv_cdf(
    (shape.gates - shape.share) / (1 - shape.share)
  )  # so far below 0 are the gates that do not fire

  def rows(base: float, lift: float) -> np.ndarray:  # [F, D]: products N(base, 1), and lifted where the neuron fires
    w = noise(unit, width, dim)
    w[:, 0], w[:, 1 : 1 + CLASSES] = base / LOUD, lift / LOUD * fires
    return w

  def down() -> np.ndarray:
    w = noise(0.02 / layers * width**-0.5, width, dim)[:, ::-1]  # in another order than gate, which would hear an echo
    w[:, loud] = 0
    return w

  def fc1() -> np.ndarray:
    w = noise(unit, rank, dim)
    w[:CLASSES] = 0
    w[np.arange(CLASSES), 1 + np.arange(CLASSES)] = 1
    return w

  def fc2() -> np.ndarray:
    w = noise(1e-3, width, rank)
    w[:, :CLASSES] = np.where(fires, 4, -4)
    return w

  def put(*arrays: np.ndarray) -> Any:
    return jax.device_put(np.stack(arrays))

  def layer() -> dict[str, Any]:
    made = {name: jnp.ones(dim) for name in ("attention_norm", "ffn_norm")}
    made["qkv"] = put(*noise(unit, heads + 2 * kv_heads, dim))
    out = noise(0.1 / layers * unit, dim, heads)
    out[loud] = 0
    made["out"] = put(*out)
    gates, ups = (put(*[rows(base, lift)] * experts) for base, lift in ((cold, 6.0), (-6.0, 12.0)))
    made["neurons"] = Neurons(gates, ups, put(*[down()] * experts))
    made["fc1"], made["fc2"] = put(*[fc1()] * experts), put(*[fc2()] * experts)
    if config.num_experts:
      made["router"] = jnp.asarray(noise(unit, dim, experts).astype(np.float32))
    return made

  embed = np.roll(noise(1.0, config.vocab_size, dim), 1, axis=1)  # no row is one of gate's
  embed[:, loud] = 0
  embed[:, 0] = LOUD
  embed[np.arange(config.vocab_size), 1 + np.arange(config.vocab_size) % CLASSES] = LOUD
  params = {
    "embed": jax.device_put(embed),
    "final_norm": jnp.ones(dim),
    "layers": [layer() for _ in range(layers)],
  }
  return config, params | {"head": jax.device_put(noise(unit, config.vocab_size, dim))}
