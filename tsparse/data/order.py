"""The order of documents: a keyed bijection of 0 .. n-1, computed for any number alone: a position is one integer.

A Feistel network over the smallest power of four that holds n; numbers that fall outside are sent through it again
(cycle walking), so that it is a bijection of 0 .. n-1 too.
"""

import functools

import numpy as np

ROUNDS = 6


@functools.lru_cache(maxsize=4096)
def round_keys(*key: int) -> np.ndarray:
  """ROUNDS independent numbers, uint64, of any non-negative integers, the same on every machine."""
  return np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)


def shuffled(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
  """Where the bijection of 0 .. n-1 that belongs to `keys` sends each of `index`; int64, of the same shape."""
  half = np.uint64(max(1, (n - 1).bit_length() + 1 >> 1))  # bits of each side
  low = (np.uint64(1) << half) - np.uint64(1)
  index = np.asarray(index).astype(np.uint64)
  outside = np.ones(index.shape, bool)
  while outside.any():
    left, right = index >> half, index & low
    for key in keys:
      left, right = right, left ^ (_mixed(right ^ key) & low)
    index = np.where(outside, left << half | right, index)
    outside = index >= n
  return index.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64: every bit of x reaches every bit of the result. Products are modulo 2^64."""
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> np.uint64(31)
