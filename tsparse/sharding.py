"""Where arrays live: the mesh, one table from axis letters to mesh axes, and the (regex, action) matcher."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tsparse.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Axis letter -> mesh axes. In one array a mesh axis shards the first letter that claims it: activations [B, T, D] have
# B on data, fsdp and expert, so their D stays whole, a weight [D, F] is split over fsdp, expert and tensor, and that of
# experts [E, D, F] over expert, fsdp and tensor.
RULES = {
  "B": ("data", "fsdp", "expert"),
  "T": (),
  "D": ("fsdp", "expert"),
  "F": ("tensor",),
  "N": ("tensor",),
  "K": ("tensor",),
  "H": (),
  "V": ("tensor",),
  "E": ("expert",),
  "R": (),
  "L": (),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh with the axes data, fsdp, tensor, expert over `devices` (default: all).

  Args:
    sizes: length of each axis; one of them may be -1, which takes what the others leave.
    devices: default `jax.devices()`.

  Raises:
    UserError: the product of the lengths is not the number of devices, or slices do not divide the data axis.
  """
  devices = jax.devices() if devices is None else devices
  shape = [sizes[axis] for axis in MESH_AXES]
  asked = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
  if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
    raise UserError(f"config.mesh ({asked}): every axis is a positive number, and at most one is -1 (the rest).")
  known = math.prod(size for size in shape if size != -1)
  if -1 in shape and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices):
    raise UserError(
      f"config.mesh ({asked}) covers {known} devices and there are {len(devices)}: the product of the axes must "
      f"be {len(devices)}; set for instance --config.mesh.fsdp=-1 and the others to 1."
    )
  slices = slice_count(devices)
  if shape[0] % slices:
    raise UserError(
      f"config.mesh ({asked}) on {slices} slices: the network between slices carries the data axis alone; set "
      f"--config.mesh.data={slices}, or a multiple."
    )
  # Auto axes: jax.make_mesh defaults to Explicit ones, which Linen's modules do not support.
  return jax.sharding.Mesh(arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def slice_count(devices: Sequence[jax.Device]) -> int:
  """How many TPU slices the devices are of; 1 for all others."""
  on_tpu = devices[0].platform == "tpu"
  return len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1


def arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """The devices in an array of `shape`, neighbours of a torus near each other; of slices each has its part of data."""
  slices = slice_count(devices)
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  inside, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
  return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def spec(axes: Sequence[str]) -> P:
  """PartitionSpec of an array whose dimensions are the letters `axes`: `"BTD"` -> P(("data", "fsdp", "expert"))."""
  used, entries = set(), []
  for letter in axes:
    free = tuple(axis for axis in RULES[letter] if axis not in used)
    used.update(free)
    entries.append(free if len(free) != 1 else free[0])
  return P(*(entry or None for entry in entries))


def evaluation_mesh(widths: Iterable[int]) -> jax.sharding.Mesh:
  """All devices, for forward passes of models of the widths D.

  Parameters are split over all of them where every D allows it, else copied; rows are split either way.
  """
  axis = "data" if any(width % jax.device_count() for width in widths) else "fsdp"
  return make_mesh(dict.fromkeys(MESH_AXES, 1) | {axis: -1})


def evaluation_rows(batch_size: int | None, usual: int = 16) -> int:
  """Rows of a forward pass on an `evaluation_mesh`: `batch_size`, or where it is None `usual`, or more to divide.

  Raises:
    UserError: `batch_size` does not divide over the devices.
  """
  devices = jax.device_count()
  batch_size = batch_size or -(-usual // devices) * devices
  if batch_size % devices:
    raise UserError(f"--batch_size={batch_size} does not divide over {devices} devices: use a multiple of {devices}.")
  return batch_size


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """`x` with its sharding fixed by the letters of its dimensions; unchanged when no mesh is set (`jax.set_mesh`)."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


def replicate(tree: Any) -> Any:
  """`tree` with a whole copy of each array on every device; unchanged when no mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def shardings(mesh: jax.sharding.Mesh, logical: Any) -> Any:
  """Tree of NamedSharding for a tree of PartitionSpec whose entries are axis letters (nn.get_partition_spec)."""
  return jax.tree.map(lambda s: NamedSharding(mesh, spec(s)), logical, is_leaf=lambda s: isinstance(s, P))


def place(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """A batch [B, T] on the devices, its rows split over the data axes.

  Each host puts the rows of its own devices there, whichever the mesh gives them, and need not have the others.
  """
  rows = NamedSharding(mesh, spec("BT"))
  return {name: jax.make_array_from_callback(x.shape, rows, x.__getitem__) for name, x in batch.items()}


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
  """The rows of a batch [B, T] that `place` puts on devices of this host."""
  rows = NamedSharding(mesh, spec("B")).addressable_devices_indices_map((batch_size,))
  return sorted({row for (part,) in rows.values() for row in range(*part.indices(batch_size))})


def shard_count(mesh: jax.sharding.Mesh, letter: str) -> int:
  """Number of parts an axis is split into by the mesh axes of its rule."""
  return math.prod(mesh.shape[axis] for axis in RULES[letter])


def check_divisible(mesh: jax.sharding.Mesh, sizes: Mapping[str, int]):
  """Raises UserError when an axis of length `sizes[letter]` does not divide over the mesh axes of its rule."""
  for letter, size in sizes.items():
    if size % shard_count(mesh, letter):
      axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[letter])
      raise UserError(f"axis {letter} has length {size}, which does not divide over config.mesh {axes}.")


def path_name(path: tuple) -> str:
  """`layers/ffn/gate` for a key path of jax.tree_util."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def match(rules: Sequence[tuple[str, Any]], tree: Any) -> Any:
  """Tree of actions: for each leaf the action of the first rule whose regex matches the whole path of the leaf.

  Args:
    rules: (regex, action) pairs, tried in order against paths like `layers/ffn/gate`.
    tree: any pytree.

  Raises:
    UserError: a leaf that no rule matches, or a rule that is the first match of no leaf.
  """
  unused = {pattern for pattern, _ in rules}

  def action(path, _):
    name = path_name(path)
    for pattern, value in rules:
      if re.fullmatch(pattern, name):
        unused.discard(pattern)
        return value
    raise UserError(f"parameter {name!r} matches none of the rules {[pattern for pattern, _ in rules]}; add one.")

  actions = jax.tree_util.tree_map_with_path(action, tree)
  if unused:
    raise UserError(f"rules {sorted(unused)} match no parameter; remove or mend them.")
  return actions
