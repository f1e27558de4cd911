"""Files and folders written whole, and JSON that every reader accepts."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsparse.errors import UserError


def write(path: Path, content: str | bytes):
  """Writes a file so that a reader meets the old one or the new one, never half of it."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_bytes(content.encode() if isinstance(content, str) else content)
  temporary.replace(path)


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
  """Raises UserError when the folder `out` of a command (--out) holds anything already."""
  try:
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
  except OSError as error:
    raise UserError(f"--out={out} cannot be read ({error.strerror}): give another folder.") from None
  if used:
    raise UserError(f"--out={out} is in use: give a folder that does not exist yet.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A scratch folder beside `out` that becomes `out` when all went well, and is removed otherwise."""
  check_new(out)
  target = out.absolute()  # "." has no name
  scratch = target.with_name(f".{target.name}.{os.getpid()}")
  try:
    scratch.mkdir(parents=True)
  except OSError as error:
    raise UserError(f"--out={out} cannot be written ({error.strerror}): give another folder.") from None
  try:
    yield scratch
    if target.exists():
      target.rmdir()
    scratch.replace(target)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
