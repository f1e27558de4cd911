"""Rotary positions (RoPE, arXiv 2104.09864) and the scalings that stretch them to longer texts.

A scaling is written as in config.json of Hugging Face, on one line: `llama3:factor=8,low_freq_factor=1,...`. With S the
factor, T the original_max_position_embeddings and f_i = theta^(-2i/H), the frequency of pair i of a head becomes

    linear     f_i / S
    llama3     f_i where a turn takes less than T / high_freq_factor tokens, f_i / S where it takes more than
               T / low_freq_factor, blended between
    yarn       f_i where i turns more than beta_fast times in T tokens, f_i / S where it turns less than beta_slow
               times, blended between; cosine and sine are multiplied by attention_factor

To add one: write the function with its formula and source, add a line to SCALINGS.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.errors import UserError

Array = jax.Array


def linear(frequencies: np.ndarray, theta: float, factor: float) -> tuple[np.ndarray, float]:
  """f / factor: Position Interpolation (arXiv 2306.15595)."""
  del theta
  return frequencies / factor, 1.0


def llama3(
  frequencies: np.ndarray,
  theta: float,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_max_position_embeddings: float,
) -> tuple[np.ndarray, float]:
  """s f + (1 - s) f / factor, s = clip((T f / 2 pi - low) / (high - low), 0, 1): Llama 3.1 (arXiv 2407.21783).

  T f / 2 pi is the number of turns in the T tokens of the original length.
  """
  del theta
  turns = original_max_position_embeddings * frequencies / (2 * math.pi)
  kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
  return kept * frequencies + (1 - kept) * frequencies / factor, 1.0


def yarn(
  frequencies: np.ndarray,
  theta: float,
  factor: float,
  original_max_position_embeddings: float,
  beta_fast: float = 32.0,
  beta_slow: float = 1.0,
  attention_factor: float | None = None,
  mscale: float | None = None,
  mscale_all_dim: float | None = None,
  truncate: float = 1.0,
) -> tuple[np.ndarray, float]:
  """s f + (1 - s) f / factor with the ramp s = 1 - clip((i - first) / (last - first), 0, 1): YaRN (arXiv 2309.00071).

  Pair i turns b times in T tokens where i = H ln(T / (2 pi b)) / (2 ln theta): that of beta_fast is `first`, that of
  beta_slow is `last`, rounded outwards if `truncate`. The attention factor, unless given, is m(1) with
  m(a) = 0.1 a ln(factor) + 1, or m(mscale) / m(mscale_all_dim) when both are given (DeepSeek-V2, arXiv 2405.04434).
  """
  pairs = len(frequencies)
  first, last = (
    pairs * math.log(original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)
    for turns in (beta_fast, beta_slow)
  )
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, 2 * pairs - 1)
  if first == last:
    last += 0.001  # a step, as in the code of the paper
  kept = 1 - np.clip((np.arange(pairs, dtype=np.float32) - first) / (last - first), 0, 1)
  if attention_factor is None:
    above, below = (mscale, mscale_all_dim) if mscale and mscale_all_dim else (1.0, 0.0)
    attention_factor = (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
  return kept * frequencies + (1 - kept) * (frequencies / factor), attention_factor


# name -> (the function, the numbers it needs, the numbers it may be given)
SCALINGS = {
  "linear": (linear, ("factor",), ()),
  "llama3": (llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
  "yarn": (
    yarn,
    ("factor", "original_max_position_embeddings"),
    ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
  ),
}
# What must hold of the numbers, those left out aside.
CONDITIONS = {
  "factor is at least 1": lambda n: n.get("factor", 1) >= 1,
  "high_freq_factor is above low_freq_factor": lambda n: n.get("high_freq_factor", 1) > n.get("low_freq_factor", 0),
  "beta_fast is above beta_slow": lambda n: n.get("beta_fast", 32) > n.get("beta_slow", 1),
  "original_max_position_embeddings is a whole number": lambda n: n.get("original_max_position_embeddings", 1) % 1 == 0,
  "truncate is 0 or 1": lambda n: n.get("truncate", 1) in (0, 1),
  "all others are positive": lambda n: all(0 < value < math.inf for key, value in n.items() if key != "truncate"),
}


def parse_scaling(text: str) -> tuple[str, dict[str, float]]:
  """The name and the numbers of a scaling: `"linear:factor=4"` -> ("linear", {"factor": 4.0}).

  Raises:
    UserError: the scaling or one of its numbers is unknown, missing, given twice, or out of range.
  """
  name, _, rest = text.partition(":")
  if name not in SCALINGS:
    known = (f"{key}:{','.join(f'{number}=...' for number in SCALINGS[key][1])}" for key in SCALINGS)
    raise UserError(f"rope_scaling {text!r} is unknown: choose one of {'; '.join(known)}.")
  _, needed, optional = SCALINGS[name]
  numbers = {}
  for item in rest.split(","):
    key, _, value = item.partition("=")
    if key not in needed + optional or key in numbers or not re.fullmatch(r"\d+(\.\d+)?(e[-+]?\d+)?", value):
      raise UserError(
        f"rope_scaling {text!r}: {item!r} should be NAME=NUMBER, where {name} takes {', '.join(needed + optional)}, "
        "each once."
      )
    numbers[key] = float(value)
  missing = [key for key in needed if key not in numbers]
  if missing:
    raise UserError(f"rope_scaling {text!r} lacks {', '.join(missing)}.")
  for sentence, holds in CONDITIONS.items():
    if not holds(numbers):
      raise UserError(f"rope_scaling {text!r} is impossible: it must be so that {sentence}.")
  return name, numbers


def rotary_frequencies(head_dim: int, theta: float, scaling: str = "") -> tuple[np.ndarray, float]:
  """Radians per position of each pair [H/2], float32, and what cosine and sine are multiplied by.

  They are constants of the model, computed on the host in the order of transformers: one unit in the last place of a
  frequency is already seen in the logits after 1000 positions, and XLA's power differs between devices.

  Args:
    head_dim: H, even.
    theta: base of the frequencies theta^(-2i/H).
    scaling: "" for these frequencies themselves, or see SCALINGS.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)  # [H/2]
  frequencies = 1 / np.float32(theta ** exponents.astype(np.float64))
  if not scaling:
    return frequencies, 1.0
  name, numbers = parse_scaling(scaling)
  return SCALINGS[name][0](frequencies, theta, **numbers)


def rotary_angles(positions: Array, head_dim: int, theta: float, scaling: str = "") -> tuple[Array, Array]:
  """Cosine and sine [..., T, 1, H/2], float32, of the angles position * frequency, times the scaling's factor.

  Args:
    positions: [..., T] int32, position of each token in its segment.
    head_dim: see `rotary_frequencies`, as theta and scaling.
    theta: base of the frequencies.
    scaling: of the frequencies.
  """
  frequencies, magnitude = rotary_frequencies(head_dim, theta, scaling)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [..., T, 1, H/2]
  return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates the pairs (x_i, x_{i + H/2}) of each head by the rotary angles: the layout of Hugging Face checkpoints.

  Args:
    x: [B, T, N, H].
    cos: [B, T, 1, H/2] float32.
    sin: [B, T, 1, H/2] float32.
  """
  return _rotate(x, cos, sin)


@jax.custom_vjp
def _rotate(x: Array, cos: Array, sin: Array) -> Array:
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# the angles are no function of any parameter
_rotate.defvjp(
  lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
  lambda angles, dout: (_rotate(dout, angles[0], -angles[1]), None, None),
)
