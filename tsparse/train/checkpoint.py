"""Checkpoints on disk: Orbax, asynchronous, the last N, with the position in the data inside.

WORKDIR/checkpoints/STEP/{params, optimizer, data}      beside the WORKDIR's config.json (tsparse/workdir.py)
"""

import base64
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tsparse.errors import UserError
from tsparse.train.step import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each item it was not asked for as a warning


def manager(workdir: Path, keep: int = 1) -> ocp.CheckpointManager:
  """The checkpoints of a workdir; use it as a context, which waits for the last save."""
  options = ocp.CheckpointManagerOptions(
    preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
  )
  return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, data: bytes, tokens_seen: int):
  """Starts writing `state` and the data position; returns as soon as the arrays are copied.

  Args:
    checkpoints: of the workdir.
    state: after some step.
    data: state of the iterator that gave that step's batch.
    tokens_seen: tokens the model was trained on so far, those before its `init` included.
  """
  arguments = ocp.args.Composite(
    params=ocp.args.StandardSave(state.params),
    optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
    data=ocp.args.JsonSave({"iterator": base64.b64encode(data).decode(), "tokens_seen": tokens_seen}),
  )
  checkpoints.save(int(state.step), args=arguments)


def save_parameters(workdir: Path, params: Any, tokens_seen: int):
  """Writes `params` alone as step 0 of a workdir, a start for others, and waits until it is there."""
  arguments = ocp.args.Composite(
    params=ocp.args.StandardSave(params), data=ocp.args.JsonSave({"tokens_seen": tokens_seen})
  )
  with manager(workdir) as checkpoints:
    checkpoints.save(0, args=arguments)


def restore(checkpoints: ocp.CheckpointManager, step: int, target: TrainState) -> tuple[TrainState, bytes, int]:
  """What `save` wrote at `step`: state (shapes and shardings of `target`), data position, tokens seen."""
  found = checkpoints.restore(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardRestore(target.params),
      optimizer=ocp.args.StandardRestore({"step": target.step, "opt_state": target.opt_state}),
      data=ocp.args.JsonRestore(),
    ),
  )
  state = TrainState(params=found["params"], **found["optimizer"])
  return state, base64.b64decode(found["data"]["iterator"]), found["data"]["tokens_seen"]


def restore_parameters(workdir: Path, target: Any) -> tuple[Any, int]:
  """The newest parameters of a workdir, with the shapes and shardings of `target`, and the tokens they have seen."""
  with manager(workdir) as checkpoints:
    step = checkpoints.latest_step()
    if step is None:
      raise UserError(f"{workdir} holds no finished checkpoint: train it first.")
    arguments = ocp.args.Composite(params=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
    found = checkpoints.restore(step, args=arguments)
  return found["params"], found["data"]["tokens_seen"]


def abstract(tree: Any, shardings: Any) -> Any:
  """Tree of ShapeDtypeStruct with shardings, the target of a restore."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
