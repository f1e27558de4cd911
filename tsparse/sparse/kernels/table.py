"""Which kernels run where, and how they are called on a mesh: over its `tensor` axis, or on every device alike.

    linear         each device computes its share of the outputs
    feed_forward   each has its share of the neurons F of every expert; what `down` makes of them is added up
    attend         each has its share of the heads

Where an axis does not divide, every device computes the whole. Native and Pallas kernels need this `jax.shard_map`:
jit by itself gathers what it cannot split around a call.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
from jax.sharding import PartitionSpec as P

from tsparse.activations import Activation
from tsparse.sparse.kernels import gpu, native, reference, tpu
from tsparse.sparse.kernels.reference import Neurons, Predictor

Array = jax.Array
KERNELS = {"native": native, "tpu": tpu, "gpu": gpu, "reference": reference}
PLATFORMS = {"cpu": "native", "tpu": "tpu", "gpu": "gpu"}  # of jax.default_backend(); others have the reference


def best_kernels(dim: int) -> str:
  """The key of KERNELS for a model of that D on the default device; the reference's comes with one line on stderr."""
  platform = jax.default_backend()
  name = PLATFORMS.get(platform, "reference")
  if name == "native":
    return name if native.available() else "reference"
  if name == "tpu" and dim % tpu.LANES:
    native.say_fallback(name, f"D is {dim}, not a multiple of {tpu.LANES}")
    return "reference"
  if name == "reference":
    native.say_fallback(platform, "there are none")
  return name


def tensor_axis(size: int) -> str | None:
  """The mesh axis that an axis of that length is split over, where a mesh is set (`jax.set_mesh`) and it divides."""
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape.get("tensor", 1)
  return "tensor" if parts > 1 and size % parts == 0 else None


def _on_mesh(function: Callable, in_specs: tuple, out_specs: object) -> Callable:
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def linear(kernels: ModuleType, x: Array, w: Array) -> Array:
  """See reference.linear."""
  axis = tensor_axis(w.shape[0])
  return _on_mesh(kernels.linear, (P(), P(axis)), P(None, axis))(x, w)


def feed_forward(
  kernels: ModuleType,
  mode: str,
  activation: Activation,
  x: Array,
  chosen: Array,
  weights: Array,
  neurons: Neurons,
  predictor: Predictor | None = None,
) -> tuple[Array, Array]:
  """See reference.feed_forward."""
  axis = tensor_axis(neurons.gate.shape[1])
  by_neuron = P(None, axis)

  def local(*args) -> tuple[Array, Array]:
    partial = kernels.feed_forward(mode, activation, *args)
    return jax.lax.psum(partial, axis) if axis else partial

  of_predictor = predictor and jax.tree.map(lambda _: P(), predictor)._replace(fc2=by_neuron)
  specs = P(), P(), P(), Neurons(*(by_neuron,) * 3), of_predictor
  return _on_mesh(local, specs, (P(), P()))(x, chosen, weights, neurons, predictor)


def attend(
  kernels: ModuleType,
  query: Array,
  key: Array,
  value: Array,
  positions: Array,
  window: int,
  scale: float,
  cap: float = 0.0,
) -> Array:
  """See reference.attend."""
  axis = tensor_axis(key.shape[1])
  local = functools.partial(kernels.attend, window=window, scale=scale, cap=cap)
  heads, kept = P(None, None, axis), P(None, axis)
  return _on_mesh(local, (heads, kept, kept, P()), heads)(query, key, value, positions)
