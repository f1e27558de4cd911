"""The newest checkpoint that is whole. One that is torn is set aside, not deleted, and said to be.

WORKDIR/newest.json    {"step": the newest checkpoint that was whole once}
WORKDIR/torn/STEP      what is left of those that no longer are
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tsparse import files, hosts
from tsparse.errors import UserError
from tsparse.train import checkpoint, damage
from tsparse.train.step import TrainState

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds: the state after `step`, the position in the data, the tokens seen."""

  step: int
  state: TrainState
  position: bytes
  tokens_seen: int


def restore_newest(workdir: Path, target: TrainState, warn: Callable[[str], None]) -> Restored | None:
  """The newest whole checkpoint of a workdir; None where none was ever saved.

  Args:
    workdir: ours to write.
    target: ShapeDtypeStructs with shardings.
    warn: is told, in a sentence, of a checkpoint that is torn or gone, and which one is used instead.

  Raises:
    UserError: there were checkpoints, and none is whole; or what `damage.read_agreed` raises but for damage.
    RunFailure: as there.
  """

  def restore(step: int) -> Restored:
    with checkpoint.reader(workdir) as checkpoints:
      read = functools.partial(checkpoint.restore, checkpoints, step, target)
      found = checkpoint.read_whole(workdir, step, checkpoint.ITEMS, read)
    return Restored(step, *found)

  recorded = _recorded(workdir)  # before the hosts meet, after which the first may write it
  found, torn = newest_whole(finished(workdir), restore)
  if found is None:
    if torn:
      each = "; ".join(f"step {step}: {reason}" for step, reason in torn.items())
      raise UserError(
        f"no checkpoint of {workdir} can be restored ({each}): put a whole one into {workdir}/checkpoints, or start "
        "again in a new --workdir."
      )
    if recorded:
      raise UserError(
        f"{workdir} had a checkpoint of step {recorded} and has none any more: put one back into "
        f"{workdir}/checkpoints, or start again in a new --workdir."
      )
    return None
  instead = f"going on from that of step {found.step} instead"
  if recorded > max([found.step, *torn]):
    warn(f"the checkpoint of step {recorded} of {workdir} is gone; {instead}.")
  for step, reason in torn.items():
    place = _aside(workdir, step)
    hosts.on_main(lambda step=step, place=place: _move(workdir / "checkpoints" / str(step), place))
    warn(f"the checkpoint of step {step} of {workdir} is torn ({reason}); {instead}. What is left of it is in {place}.")
  if recorded != found.step:
    hosts.on_main(lambda: record(workdir, found.step))
  return found


def record(workdir: Path, step: int):
  """Notes that the checkpoint of `step` is whole, so that it is missed when it is gone."""
  files.write(workdir / "newest.json", files.to_json({"step": step}))


def newest_whole(steps: Sequence[int], restore: Callable[[int], T]) -> tuple[T | None, dict[int, str]]:
  """What `restore` makes of the newest step that is not torn, and how those that are newer are."""
  torn = {}
  for step in sorted(steps, reverse=True):
    try:
      return restore(step), torn
    except damage.Torn as error:  # on all hosts alike
      torn[step] = error.reason
  return None, torn


def finished(workdir: Path) -> list[int]:
  """The steps of the finished checkpoints of a workdir."""
  if not (workdir / "checkpoints").is_dir():
    return []
  with checkpoint.reader(workdir) as checkpoints:
    return sorted(checkpoints.all_steps())


def _recorded(workdir: Path) -> int:
  path = workdir / "newest.json"
  try:
    return int(json.loads(path.read_text())["step"])
  except FileNotFoundError:
    return 0
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{path} is damaged ({damage.why(error)}): take it away, then give the same command again."
    ) from None


def _aside(workdir: Path, step: int) -> Path:
  places = (workdir / "torn" / (f"{step}.{n}" if n else str(step)) for n in range(10**6))
  return next(place for place in places if not place.exists())


def _move(folder: Path, place: Path):
  try:
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
  except OSError as error:
    raise UserError(f"the torn checkpoint {folder} cannot be moved to {place} ({error.strerror}): move it.") from None
