"""A parameter that is read slice by slice, so that a model passes through memory without being held there."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter of ours, not in memory: shape and dtype are known, its slices are read when asked for.

  Attributes:
    shape: of the whole, the axes that it is stacked over (layers, experts) first.
    dtype: float32 or bfloat16.
    depth: how many leading axes `read` takes an index of: 0, 1 or 2.
    read: index of `depth` integers -> the slice there, [*shape[depth:]], of `dtype`. It is quick when the indices come
      in order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  depth: int
  read: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Size of the whole."""
    return math.prod(self.shape) * self.dtype.itemsize

  @property
  def indices(self) -> list[Index]:
    """The index of every slice, in the order of memory; the one index () when nothing is stacked."""
    return list(np.ndindex(self.shape[: self.depth]))

  def at(self, index: Index) -> np.ndarray:
    """The part at an index of any length: `parameter[index]`."""
    if len(index) >= self.depth:
      return self.read(index[: self.depth])[index[self.depth :]]
    return np.stack([self.at((*index, i)) for i in range(self.shape[len(index)])])


def whole(leaf: Leaf, dtype: np.dtype) -> np.ndarray:
  """The whole parameter as an array of `dtype`."""
  parameter = np.empty(leaf.shape, dtype)
  for index in leaf.indices:
    parameter[index] = leaf.read(index)
  return parameter


def cast(leaf: Leaf, dtype: np.dtype) -> Leaf:
  """The same parameter in another dtype, rounded to nearest even where it is narrower."""
  return dataclasses.replace(leaf, dtype=dtype, read=lambda index: leaf.read(index).astype(dtype, copy=False))


def counted(leaf: Leaf, advance: Callable[[int], None]) -> Leaf:
  """The same parameter; `advance` is told the bytes of each slice that is read."""

  def read(index: Index) -> np.ndarray:
    part = leaf.read(index)
    advance(part.nbytes)
    return part

  return dataclasses.replace(leaf, read=read)


def contiguous(view: np.ndarray) -> np.ndarray:
  """A contiguous copy of a view, unless it is contiguous already.

  A transposed matrix of several MB is copied 16 columns at a time: 2 to 5 times as fast as NumPy does it at once,
  because the columns being written stay in the cache.
  """
  if view.flags.c_contiguous:
    return view
  copy = np.empty(view.shape, view.dtype)
  bits = f"u{view.dtype.itemsize}"  # NumPy copies its own types twice as fast as those of ml_dtypes
  source, target = view.view(bits), copy.view(bits)
  for start in range(0, view.shape[-1], 16):
    target[..., start : start + 16] = source[..., start : start + 16]
  return copy
