"""Several hosts (processes) that train one model: who they are, what one does for all, what they agree on.

Every host runs the same program and reads the part of the data that its devices need; the devices of all of them make
up one mesh. The first host alone writes and speaks. With one host everything here is free.
"""

import functools
import glob
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsparse.errors import UserError


def start(coordinator: str | None = None, num_hosts: int | None = None, host_id: int | None = None):
  """Joins the other hosts; must come before anything else of JAX.

  Args:
    coordinator: HOST:PORT of the first host, the same everywhere; None on a TPU pod, which knows its hosts, and on one
      machine alone.
    num_hosts: how many there are.
    host_id: which of them this is, from 0.

  Raises:
    UserError: some but not all are given, they make no sense, or the hosts do not find each other.
  """
  given = {"--coordinator": coordinator, "--num_hosts": num_hosts, "--host_id": host_id}
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise UserError(f"{', '.join(missing)} must be given too: the three say together which host of a job this is.")
  if missing:
    if _on_tpu():
      jax.distributed.initialize()
    return
  name, _, port = coordinator.rpartition(":")
  if not name or not port.isdigit():
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT, an address of the first host that is free there.")
  if not 0 <= host_id < num_hosts:
    raise UserError(f"--host_id={host_id} with --num_hosts={num_hosts}: hosts are counted from 0.")
  try:
    jax.distributed.initialize(coordinator, num_hosts, host_id)
  except RuntimeError as error:
    reason = str(error).partition("\n")[0]
    raise UserError(f"host {host_id} of {num_hosts} did not meet the others at {coordinator} ({reason}).") from None


def _on_tpu() -> bool:
  platforms = os.environ.get("JAX_PLATFORMS", "tpu")
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool("tpu" in platforms and chips and importlib.util.find_spec("libtpu"))


def several() -> bool:
  """Whether there are other hosts."""
  return jax.process_count() > 1


def is_main() -> bool:
  """Whether this is the host that writes and speaks."""
  return jax.process_index() == 0


def any_host(flag: bool) -> bool:
  """Whether `flag` is true on any host; waits for all of them."""
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any()) if several() else flag


def gather(mine: bytes) -> list[bytes]:
  """The bytes of every host, in order; waits for all of them."""
  if not several():
    return [mine]
  sizes = multihost_utils.process_allgather(np.asarray(len(mine), np.int32))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  everyone = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes() for row, size in zip(everyone, sizes, strict=True)]


def whole(tree: Any) -> Any:
  """The whole of arrays that are split over the devices of all hosts, as numpy arrays on each; waits for all."""
  return multihost_utils.process_allgather(tree, tiled=True) if several() else jax.tree.map(np.asarray, tree)


def on_main(work: Callable[[], Any]):
  """Runs `work` on the first host while the others wait; what it raises there ends the others with a UserError."""
  error = None
  if is_main():
    try:
      work()
    except Exception as raised:  # the others wait, whatever it is
      error = raised
  failed = any_host(error is not None)
  if error is not None:
    raise error
  if failed:
    raise UserError("the first host could not go on, and says why.")


def vote(flag: bool, mesh: jax.sharding.Mesh) -> Any:
  """Whether any host votes `flag`, a bool [] that is not waited for: its cost hides behind the step before it."""
  if not several():
    return np.asarray(flag)
  ballots = NamedSharding(mesh, P(mesh.axis_names))
  mine = np.full([mesh.size], flag)  # of which the devices of this host take their places
  return _any(mesh)(jax.make_array_from_callback(mine.shape, ballots, mine.__getitem__))


@functools.cache
def _any(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
