"""Reading a checkpoint: what counts as damage, on which the one before is taken, and what is an error that may pass."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tsparse import checksums, hosts
from tsparse.errors import RunFailure, UserError

T = TypeVar("T")

PAUSE = 2.0  # seconds before what failed is tried again
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
UNDECODABLE = (ValueError, KeyError, EOFError)  # of JSON, of zarr and of TensorStore, unless its status says otherwise
STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")  # that messages of TensorStore begin with
BROKEN = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT")
# What Orbax says where the arrays that are asked for are not those that are stored.
OTHER_MODEL = ("is not compatible with the stored shape", "tree structures do not match")


class Torn(UserError):
  """A checkpoint is damaged.

  Attributes:
    reason: how, for a sentence of others.
  """

  def __init__(self, workdir: Path, step: int, reason: str):
    super().__init__(
      f"the checkpoint of step {step} of {workdir} is torn ({reason}): put a whole one into its checkpoints/, or move "
      "it away for the one before."
    )
    self.reason = reason


def is_damage(error: BaseException) -> bool:
  """Whether an error comes of files that are missing or that do not hold what was written.

  Checksums decide where there are any (`checkpoint.read_whole` compares them first); this is for what gets past them.
  """
  error = _cause(error)
  if any(text in str(error) for text in OTHER_MODEL):
    return False
  status = STATUS.match(str(error))
  return isinstance(error, MISSING) or (isinstance(error, UNDECODABLE) and (not status or status[1] in BROKEN))


def failure_to_read(what: str, error: BaseException) -> Exception:
  """The sentence for an error that is no damage and came up twice, about `what` ("the checkpoint of ...")."""
  error = _cause(error)
  reason = why(error)
  if any(text in reason for text in OTHER_MODEL):
    return UserError(
      f"{what} holds other arrays than this model has ({reason.partition(': ')[2]}): it was written for another; "
      "nothing was moved."
    )
  if isinstance(error, PermissionError) or "PERMISSION_DENIED" in reason:
    return UserError(f"{what} cannot be read ({reason}): make it readable; nothing was moved.")
  return RunFailure(
    f"{what} could not be read, twice ({reason}). Its files may be whole, and nothing was moved: remove the cause, "
    "then give the same command again."
  )


def read_agreed(workdir: Path, step: int, read: Callable[[], T]) -> T:
  """What `read` makes of the checkpoint of `step`; all hosts call it, and go by what any of them meets.

  Args:
    workdir: of ours.
    step: one of its checkpoints.
    read: may raise anything. What is no damage is tried again once, after `PAUSE`.

  Raises:
    Torn: it is damaged.
    UserError: it is of another model, or must not be read.
    RunFailure: it failed twice, of something else.
  """
  for again in (True, False):
    found, error = None, None
    try:
      found = read()
    except Exception as raised:  # whatever Orbax makes of it, memory that is short included
      error = raised
    if hosts.any_host(error is not None and is_damage(error)):
      raise Torn(workdir, step, why(_cause(error)) if error else "another host cannot read it") from error
    if not hosts.any_host(error is not None):
      return found
    if again:
      time.sleep(PAUSE)
  what = f"the checkpoint of step {step} of {workdir}"
  raise failure_to_read(what, error or RuntimeError("another host says why")) from error


def read_again(read: Callable[[], T]) -> T:
  """What `read` gives, tried again once where it fails of something that is no damage; on this host alone."""
  try:
    return read()
  except Exception as error:
    if is_damage(error):
      raise
  time.sleep(PAUSE)
  return read()


def why(error: BaseException) -> str:
  """The first line of an error of Orbax's, with its type; what does not match a checksum is said as it is."""
  if isinstance(error, checksums.Mismatch):
    return str(error)
  return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _cause(error: BaseException) -> BaseException:
  """What Orbax made a bare Exception of, while it read an array."""
  return error.__cause__ if type(error) is Exception and error.__cause__ else error
