"""Files and folders written whole, and JSON that every reader accepts."""

import errno
import fcntl
import glob
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from tsparse.errors import RunFailure, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what room would help against


def write(path: Path, content: str | bytes):
  """Writes a file so that a reader meets the old one or the new one, never half of it."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_bytes(content.encode() if isinstance(content, str) else content)
  temporary.replace(path)


def by_umask(path: Path):
  """Gives a file that a library made for its user alone (as safetensors does) the permissions of any new file."""
  probe = path.with_name(f".{path.name}.{os.getpid()}")
  probe.touch()
  path.chmod(stat.S_IMODE(probe.stat().st_mode))
  probe.unlink()


def strict(value: Any) -> Any:
  """`value` as plain JSON types, numbers that are not finite as None; arrays become lists and paths text."""
  if hasattr(value, "tolist"):  # NumPy and JAX, arrays and scalars
    value = value.tolist()
  if isinstance(value, dict):
    return {str(k): strict(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [strict(v) for v in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def to_json(value: Any) -> str:
  """`strict(value)`, indented, with a newline at the end."""
  return json.dumps(strict(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def check_new(out: Path):
  """Raises UserError when the folder `out` of a command (--out) holds anything already or is the current one."""
  try:
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    current = out.exists() and out.samefile(".")
  except OSError as error:
    raise UserError(f"--out={out} cannot be read ({error.strerror}): give another folder.") from None
  if used:
    raise UserError(f"--out={out} is in use: give a folder that does not exist yet.")
  if current:  # replacing it would leave this process, and the user's shell, in a folder that is no more
    raise UserError(f"--out={out} is the current folder: give one that does not exist yet.")


def to_line(value: Any) -> str:
  """`strict(value)` on one line."""
  return json.dumps(strict(value), allow_nan=False, ensure_ascii=False)


@contextmanager
def new_folder(out: Path, needed: int = 0) -> Iterator[Path]:
  """A scratch folder beside `out` that becomes `out` when all went well, and is removed otherwise.

  Args:
    out: must not exist, or be empty.
    needed: bytes that will be written.

  Raises:
    UserError: `out` is in use or cannot be written, or its disk has less room.
    RunFailure: an OSError came up inside.
  """
  check_new(out)
  target = out.resolve()  # a link stays, and what it names is written
  parent = target.parent
  _remove_leftovers(parent, target.name)
  free = shutil.disk_usage(next(folder for folder in (parent, *parent.parents) if folder.exists())).free
  if needed > free:
    from rich.filesize import decimal  # --help is quick without it

    raise UserError(
      f"--out={out} needs {decimal(needed)} and its disk has {decimal(free)} left: make room, or give a folder on "
      "another."
    )
  scratch = parent / f".{target.name}.{os.getpid()}.tsparse"
  try:
    scratch.mkdir(parents=True)
  except OSError as error:
    raise UserError(f"--out={out} cannot be written ({error.strerror}): give another folder.") from None
  lock = os.open(scratch, os.O_RDONLY)  # the kernel frees it however the process ends
  fcntl.flock(lock, fcntl.LOCK_EX)
  try:
    yield scratch
    scratch.replace(target)
  except OSError as error:
    shutil.rmtree(scratch, ignore_errors=True)
    text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error)
    full = error.errno in FULL or any(os.strerror(number) in text for number in FULL)
    advice = "make room, or give another" if full else "mend that, or give another"
    raise RunFailure(f"--out={out} could not be written ({text}) and is not there: {advice}.") from error
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  finally:
    os.close(lock)


def _remove_leftovers(parent: Path, name: str):
  """Removes the scratch folders for `parent / name` whose writers were killed."""
  for scratch in parent.glob(f".{glob.escape(name)}.*.tsparse"):
    lock = os.open(scratch, os.O_RDONLY)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      logging.warning("removing %s, left by a command that was killed", scratch)
      shutil.rmtree(scratch, ignore_errors=True)
    except BlockingIOError:  # its writer lives
      pass
    finally:
      os.close(lock)
