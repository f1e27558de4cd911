"""Whether models compute natively here: products of experts (grouped.py), attention (attention.py)."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from tsparse.native import build

HANDLERS = {
  "attention.cc": ("tsparse_attention", "tsparse_attention_backward"),
  "grouped.cc": ("tsparse_grouped_products", "tsparse_grouped_transposed", "tsparse_grouped_outers"),
}


@functools.cache
def available() -> bool:
  """Whether there is native code, which this compiles; says once, in one line on stderr, if there is none and why."""
  try:
    for source, handlers in HANDLERS.items():
      build.register(Path(__file__).with_name(source), handlers)
  except build.BuildError as error:
    print(f"native code is not used: {error}; XLA computes attention and experts, more slowly.", file=sys.stderr)
    return False
  return True


def usable(x: jax.Array) -> bool:
  """Whether native code can take x here: float32, on a CPU.

  All lowerings are traced wherever a model runs, and what runs on an accelerator needs no compiler.
  """
  return x.dtype == jnp.float32 and jax.default_backend() == "cpu" and available()
