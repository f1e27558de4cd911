"""The chips that can be planned for, and the devices of a slice of them, none of which need exist."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from tsparse.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the maker says of one chip.

  Attributes:
    flops: peak bfloat16 operations per second.
    memory: bytes of HBM.
    bandwidth: bytes per second of HBM.
    interconnect: bytes per second out of the chip over all its links, one way.
    dimensions: of the torus.
  """

  flops: float
  memory: float
  bandwidth: float
  interconnect: float
  dimensions: int


CHIPS = {
  # cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, ICI 1600 Gbps (400 GBps both ways)
  "v5e": Chip(197e12, 16e9, 819e9, 200e9, 2),
  # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB, 2765 GBps, ICI 1200 GBps both ways
  "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 3),
  # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1600 GBps, ICI 3200 Gbps
  "v6e": Chip(918e12, 32e9, 1600e9, 400e9, 2),
}
EXAMPLES = "v5e:16x16, v5p:4x4x8, v6e:16x16 (another size of the slice too), cpu:8 (another number too)"

# libtpu looks for a TPU host around it, and for other programs that use it, unless it is told about them.
QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """`"v5p:4x4x8"` -> `("v5p", (4, 4, 8))`; UserError names the known ones."""
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  kind, shape = (found[1], tuple(map(int, found[2].split("x")))) if found else ("", ())
  dimensions = 1 if kind == "cpu" else CHIPS[kind].dimensions if kind in CHIPS else 0
  if not dimensions or len(shape) != dimensions or not all(shape):
    raise UserError(f"--topology={name} is unknown: choose one like {EXAMPLES}.")
  return kind, shape


def devices(name: str) -> tuple[list[jax.Device], bool]:
  """The devices of a topology, and whether programs can be compiled for them.

  TPUs are libtpu's, which compiles for chips that are not there; where it is not installed, as many virtual CPU devices
  stand in for them, enough to know how arrays would be split.
  """
  kind, shape = parse(name)
  jax.config.update("jax_platforms", "cpu")
  if kind != "cpu" and importlib.util.find_spec("libtpu"):
    for variable, value in QUIET.items():
      os.environ.setdefault(variable, value)
    try:
      return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices), True
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
      reason = str(error).strip().splitlines()[0]
      raise UserError(f"--topology={name}: libtpu has no such slice ({reason}); choose one like {EXAMPLES}.") from None
  count = math.prod(shape)
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:  # JAX has started already
    if jax.device_count() < count:
      raise UserError(f"--topology={name}: JAX was started with {jax.device_count()} devices only.") from None
  return jax.devices()[:count], kind == "cpu"
