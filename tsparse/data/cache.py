"""The folder for what is made once and used again: extracted, unpacked and indexed text."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tsparse.errors import UserError


def cache_folder(folder: str = "") -> Path:
  """`folder`, or TSPARSE_CACHE, or ~/.cache/tsparse; made if missing."""
  root = Path(folder or os.environ.get("TSPARSE_CACHE") or "~/.cache/tsparse").expanduser()
  with writing(root):
    root.mkdir(parents=True, exist_ok=True)
  return root


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
  """Turns an OSError inside into the sentence that says which folder to change."""
  try:
    yield
  except OSError as e:
    raise UserError(
      f"Cannot write the cache folder {root}: {e.strerror or e}; set TSPARSE_CACHE or --config.data.cache to a folder "
      "that can be written and has room."
    ) from e


@contextlib.contextmanager
def new_file(path: Path) -> Iterator:
  """A binary file that becomes `path` when all went well; of several writers any may be the last."""
  with writing(path.parent):
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
  try:
    with file:
      yield file
    os.replace(file.name, path)
  except BaseException as e:
    os.unlink(file.name)
    if isinstance(e, OSError):
      with writing(path.parent):
        raise
    raise
