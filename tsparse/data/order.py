"""The order of documents: a keyed bijection of 0 .. n-1, computed number by number, so that a position is one integer.

A Feistel network over the smallest power of four that holds n; numbers that fall outside are sent through it again
(cycle walking), so that it is a bijection of 0 .. n-1 too.
"""

import functools

import numpy as np

ROUNDS = 6
WORD = (1 << 64) - 1


@functools.lru_cache(maxsize=4096)
def round_keys(*key: int) -> tuple[int, ...]:
  """ROUNDS independent 64-bit numbers of any non-negative integers, the same on every machine."""
  return tuple(int(k) for k in np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64))


def shuffled(index: int, n: int, keys: tuple[int, ...]) -> int:
  """Where the bijection of 0 .. n-1 that belongs to `keys` sends `index`."""
  half = max(1, (n - 1).bit_length() + 1 >> 1)  # bits of each side
  low = (1 << half) - 1
  while True:
    left, right = index >> half, index & low
    for key in keys:
      left, right = right, left ^ (_mixed(right ^ key) & low)
    index = left << half | right
    if index < n:
      return index


def _mixed(x: int) -> int:
  """The finaliser of splitmix64: every bit of x reaches every bit of the result."""
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
  x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
  return x ^ x >> 31
