"""Lowering for a GPU that is not there. From 0.12 on JAX wants to know which one while it traces."""

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

GPU = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
ALONE = AbstractMesh((1,), ("data",), (AxisType.Auto,))


def lowered_for_gpu(function: Callable, *args, mesh: AbstractMesh = ALONE) -> str:
  """The program of a jitted `function` for GPUs on `mesh`, before their compiler sees it."""
  gpus = AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=GPU)
  with jax.sharding.use_abstract_mesh(gpus):
    return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
