"""Checkpoints on disk: Orbax, asynchronous, the last N and every Nth step, with the position in the data inside.

WORKDIR/checkpoints/STEP/{params, optimizer, data}      beside the WORKDIR's config.json (tsparse/workdir.py)
WORKDIR/checkpoints/STEP/checksums.json                 of the files of those three

`resume.py` finds the newest that is whole, `saver.py` lives with saves that fail.
"""

import base64
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from tsparse import checksums, hosts
from tsparse.errors import UserError
from tsparse.train import damage
from tsparse.train.step import TrainState

# Orbax warns of each item of a checkpoint that it was not asked for, and of leaves, that they are no jax.Array; what
# fails in its threads it logs with tracebacks, and raises again where saver.py makes a sentence of it.
QUIET = (
  "could not be restored", "No jax.Array in TypeHandlerRegistry", "Skipping merge of OCDBT checkpoints",
  "raised an exception", "in background save thread", "Finalize thread (%s) failed", "Checkpointer failed:",
)  # fmt: skip
logging.getLogger("absl").addFilter(lambda record: not any(text in str(record.msg) for text in QUIET))

# Of parameters. Left to itself Orbax makes them 2 GB, and whoever reads one holds it several times.
CHUNK_BYTES = 64 * 1024**2
ITEMS = ("params", "optimizer", "data")
TIMEOUT = 3600  # seconds of a save, all in the background: the other hosts wait for the first to take the checksums

T = TypeVar("T")


class _Manager(ocp.CheckpointManager):
  """Takes the checksums of a step when all hosts have written it, and before its folder gets its name.

  The first host does, in Orbax's background thread; a step that is there has its checksums.
  """

  def __init__(self, folder: Path, **options):
    asynchronous = ocp.AsyncOptions(timeout_secs=TIMEOUT, post_finalization_callback=self._written)
    self._folder, self._step = folder, None
    super().__init__(folder, options=ocp.CheckpointManagerOptions(async_options=asynchronous, **options))

  def save(self, step: int, *arguments, **others) -> bool:
    self.wait_until_finished()  # the step before may still be read
    self._step = step
    return super().save(step, *arguments, **others)

  def _written(self):
    for folder in self._folder.glob(f"{self._step}{ocp.utils.TMP_DIR_SUFFIX}*"):
      write_checksums(folder)


def write_checksums(folder: Path):
  """Writes the checksums of the items of a step; what Orbax notes beside them nobody needs."""
  checksums.write(folder, (str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file()))


def manager(workdir: Path, keep: int, keep_every: int = 0) -> ocp.CheckpointManager:
  """The checkpoints of a workdir, to write; use it as a context, which waits for the last save.

  Args:
    workdir: ours to write.
    keep: so many of the last ones are kept; the others are removed when the next is saved.
    keep_every: those at multiples of so many steps are kept too, for good; 0 keeps none.
  """
  policies = [ocp.checkpoint_managers.LatestN(keep)]
  if keep_every:
    policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
  kept = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
  return _Manager((workdir / "checkpoints").absolute(), preservation_policy=kept, cleanup_tmp_directories=True)


def reader(workdir: Path, handlers: Mapping[str, ocp.CheckpointHandler] | None = None) -> ocp.CheckpointManager:
  """The checkpoints of a workdir, to read: nothing there is changed, whoever may be writing.

  Args:
    workdir: of ours.
    handlers: of the items; default those of Orbax for the arguments of `restore`.
  """
  folder = (workdir / "checkpoints").absolute()
  if not folder.is_dir():
    raise UserError(f"{workdir} holds no checkpoint: train it first.")
  options = ocp.CheckpointManagerOptions(create=False)
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def latest_step(workdir: Path) -> int:
  """The newest finished checkpoint of a workdir; UserError when there is none."""
  with reader(workdir) as checkpoints:
    step = checkpoints.latest_step()
  if step is None:
    raise UserError(f"{workdir} holds no finished checkpoint yet: wait for its first, or train it.")
  return step


def save(checkpoints: ocp.CheckpointManager, state: TrainState, data: bytes, tokens_seen: int):
  """Starts writing `state` and the data position; returns as soon as the arrays are copied.

  Args:
    checkpoints: of the workdir.
    state: after some step.
    data: state of the iterator that gave that step's batch.
    tokens_seen: tokens the model was trained on so far, those before its `init` included.
  """
  chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state.params)
  arguments = ocp.args.Composite(
    params=ocp.args.StandardSave(state.params, save_args=chunks),
    optimizer=ocp.args.StandardSave(_beside_parameters(state)),
    data=ocp.args.JsonSave({"iterator": base64.b64encode(data).decode(), "tokens_seen": tokens_seen}),
  )
  checkpoints.save(int(state.step), args=arguments)


def _beside_parameters(state: TrainState) -> dict[str, Any]:
  parts = {"step": state.step, "opt_state": state.opt_state}
  return parts if state.memory is None else parts | {"memory": state.memory}


def restore(checkpoints: ocp.CheckpointManager, step: int, target: TrainState) -> tuple[TrainState, bytes, int]:
  """What `save` wrote at `step`: state (shapes and shardings of `target`), data position, tokens seen."""
  found = checkpoints.restore(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardRestore(target.params),
      optimizer=ocp.args.StandardRestore(_beside_parameters(target)),
      data=ocp.args.JsonRestore(),
    ),
  )
  state = TrainState(params=found["params"], **found["optimizer"])
  return state, base64.b64decode(found["data"]["iterator"]), found["data"]["tokens_seen"]


def restore_parameters(workdir: Path, step: int, target: Any) -> tuple[Any, int]:
  """The parameters of a step, with the shapes and shardings of `target`, and the tokens they have seen."""
  arguments = ocp.args.Composite(params=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
  found = restore_items(workdir, step, arguments)
  return found["params"], found["data"]["tokens_seen"]


def data_position(workdir: Path) -> bytes:
  """The position in the data of the newest checkpoint of a workdir."""
  found = restore_items(workdir, latest_step(workdir), ocp.args.Composite(data=ocp.args.JsonRestore()))
  return base64.b64decode(found["data"]["iterator"])


def restore_items(
  workdir: Path,
  step: int,
  arguments: ocp.args.Composite,
  handlers: Mapping[str, ocp.CheckpointHandler] | None = None,
) -> Any:
  """The items of a step, by Orbax's arguments.

  Raises:
    UserError: the step is gone, or what `damage.read_agreed` raises.
    RunFailure: as there.
  """
  with reader(workdir, handlers) as checkpoints:
    if step not in checkpoints.all_steps():
      raise UserError(f"{workdir} no longer holds the checkpoint of step {step}: it has trained on since.")
    return read_whole(workdir, step, arguments.keys(), lambda: checkpoints.restore(step, args=arguments))


def read_whole(workdir: Path, step: int, items: Iterable[str], read: Callable[[], T]) -> T:
  """What `read` makes of the `items` of a step, when their files have the checksums that were written with them.

  Of several hosts each verifies its share of the files. Raises what `damage.read_agreed` does.
  """
  folder, items = workdir / "checkpoints" / str(step), tuple(items)
  share = jax.process_index(), jax.process_count()
  if not damage.read_agreed(workdir, step, lambda: checksums.verify(folder, items, share)) and hosts.is_main():
    _tell_unverified(folder)
  return damage.read_agreed(workdir, step, read)


@functools.cache
def _tell_unverified(folder: Path):
  absl_logging.warning("%s has no checksums (older versions wrote none): its bytes cannot be verified.", folder)


def abstract(tree: Any, shardings: Any) -> Any:
  """Tree of ShapeDtypeStruct with shardings, the target of a restore."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
