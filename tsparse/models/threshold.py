"""A threshold on the FFN hidden, one for each layer, a parameter that can be learned, calibrated or fixed.

    hidden if |hidden| >= theta else 0            theta >= 0

FATReLU (ProSparse, arXiv 2402.13516) put on the hidden, and JumpReLU where it is learned (arXiv 2407.14435): a step has
no gradient, and takes that of a window around it, here from theta / 2 to 3 theta / 2,

    d/d theta = - sign(hidden) [theta / 2 < |hidden| < 3 theta / 2]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tsparse.models.ffn import ffn_input, penalty_of

Array = jax.Array


@jax.custom_vjp
def jump(hidden: Array, theta: Array) -> Array:
  """`hidden` [..., F] with zeros where its size is below theta [] float32; its gradient passes where it is kept."""
  return jnp.where(jnp.abs(hidden).astype(jnp.float32) >= theta, hidden, 0)


def _backward(saved: tuple[Array, Array], dout: Array) -> tuple[Array, Array]:
  hidden, theta = saved
  size = jnp.abs(hidden).astype(jnp.float32)
  window = (size > theta / 2) & (size < 3 * theta / 2)
  return jnp.where(size >= theta, dout, 0), -jnp.sum(jnp.sign(hidden) * dout, where=window, dtype=jnp.float32)


jump.defvjp(lambda hidden, theta: (jump(hidden, theta), (hidden, theta)), _backward)


@struct.dataclass
class Thresholded:
  """The threshold of an FFN, and then the intervention `inner`, if there is one. See models/ffn.py.

  Attributes:
    theta: [] float32; below 0 is 0.
    inner: another intervention, or None.
  """

  theta: Array
  inner: Any = None

  def on_input(self, x: Array) -> Array:
    """That of `inner`."""
    return ffn_input(x, self.inner)

  def __call__(self, gate: Array, up: Array, hidden: Array, expert: Array | None) -> Array:
    """Hidden [..., F]."""
    hidden = jump(hidden, jnp.maximum(self.theta, 0.0))
    return hidden if self.inner is None else self.inner(gate, up, hidden, expert)

  @property
  def penalty(self) -> Callable[[Array], Array] | None:
    """That of `inner`."""
    return penalty_of(self.inner)

  @property
  def elementwise(self) -> bool:
    """Whether neurons may be split over devices."""
    return self.inner is None or getattr(self.inner, "elementwise", False)
