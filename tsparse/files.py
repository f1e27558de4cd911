"""Files written whole, and JSON that every reader accepts."""

import json
import math
import os
from pathlib import Path
from typing import Any


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
