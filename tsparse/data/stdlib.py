"""Text that is on every machine: Python's standard library, as English (`stdlib_docs`) and code (`stdlib_code`).

Extracted once into a cache folder as four `.jsonl` files; one module in 20 is held out, whole, for validation.
"""

import ast
import contextlib
import inspect
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from tsparse import checksums
from tsparse.data.cache import cache_folder, writing
from tsparse.data.sources import VALIDATION_SHARE

TASKS = {
  "stdlib": ("stdlib_docs", "stdlib_code"),
  "stdlib_docs": ("stdlib_docs",),
  "stdlib_code": ("stdlib_code",),
}
CATEGORIES = {"stdlib_docs": "prose", "stdlib_code": "code"}  # in `stdlib` each has half of the tokens

VERSION = 1  # of this file's rules: a change gives another cache folder
# Not text anybody wrote: tests' data, and tables made by a program (character maps, the manual as one dictionary).
SKIPPED_FOLDERS = {
  "site-packages",
  "dist-packages",
  "__pycache__",
  "test",
  "tests",
  "idle_test",
  "encodings",
  "pydoc_data",
}
PIECE_BYTES = 4096
SHORTEST_DOC = 20


def library() -> Path:
  """Where the running Python keeps its standard library."""
  return Path(sysconfig.get_paths()["stdlib"])


def extracted() -> Path:
  """The folder with `{stdlib_docs,stdlib_code}.{train,validation}.jsonl`, made on first use (a few seconds).

  Raises:
    UserError: the cache folder cannot be written.
  """
  root = cache_folder()
  folder = root / f"stdlib-{platform.python_implementation()}-{platform.python_version()}-v{VERSION}"
  if folder.is_dir():
    try:
      checksums.verify(folder)
      return folder
    except checksums.Mismatch as error:
      logging.warning("%s is damaged (%s): it is made again", folder, error)
      with writing(root), contextlib.suppress(FileNotFoundError):  # another process is at it too
        shutil.rmtree(folder)
  with writing(root), tempfile.TemporaryDirectory(dir=root, prefix=".stdlib-", ignore_cleanup_errors=True) as scratch:
    made = Path(scratch) / "made"
    extract(library(), made)
    checksums.write(made, [path.name for path in made.glob("*.jsonl")])
    _publish(made, folder)
  return folder


def _publish(made: Path, folder: Path):
  """Renames `made` to `folder`; where another process was first, its folder, complete, stays."""
  try:
    os.rename(made, folder)
  except OSError:
    if not folder.is_dir():
      raise
    shutil.rmtree(made, ignore_errors=True)


def extract(source_folder: Path, out: Path):
  """Writes the documents of the Python files under `source_folder` into the new folder `out`."""
  start, counts, seen = time.time(), Counter(), set()
  out.mkdir()
  files = {(t, s): open(out / f"{t}.{s}.jsonl", "wb") for t in CATEGORIES for s in ("train", "validation")}  # noqa: SIM115
  try:
    for path in _python_files(source_folder):
      name = path.relative_to(source_folder).as_posix()
      split = "validation" if zlib.crc32(name.encode()) % VALIDATION_SHARE == 0 else "train"
      try:
        source = path.read_bytes().decode().replace("\r\n", "\n")
        tree = ast.parse(source)
      except (SyntaxError, ValueError):  # ValueError: not UTF-8, or a null byte
        counts["files that do not parse"] += 1
        continue
      for text in _docs(source, tree):
        if not _is_prose(text) or text in seen:  # a copy could lie on both sides of the split
          counts["docs too short, not prose or repeated"] += 1
          continue
        seen.add(text)
        _write(files["stdlib_docs", split], text, counts)
      for piece in _pieces(source, tree):
        _write(files["stdlib_code", split], piece, counts)
  finally:
    for file in files.values():
      file.close()
  summary = {**counts, "seconds": round(time.time() - start, 1)}
  (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  logging.info("Extracted the standard library in %s: %s", source_folder, summary)


def _write(file, text: str, counts: Counter):
  try:
    line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
  except UnicodeEncodeError:  # a docstring may hold a lone surrogate
    counts["not valid Unicode"] += 1
    return
  if text.strip():
    counts["documents"] += 1
    file.write(line)


def _python_files(folder: Path) -> Iterator[Path]:
  for parent, folders, names in os.walk(folder):
    folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
    yield from (Path(parent) / name for name in sorted(names) if name.endswith(".py"))


def _docs(source: str, tree: ast.Module) -> Iterator[str]:
  """Docstrings, then blocks of whole-line comments."""
  in_string = set()  # lines in a string of several lines: a '#' there is no comment (so no slow tokenizer is needed)
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      text = ast.get_docstring(node, clean=False)
      if text:
        yield inspect.cleandoc(text)
    elif isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno > node.lineno:
      in_string.update(range(node.lineno, node.end_lineno + 1))
  block: list[str] = []
  for number, line in enumerate([*source.split("\n"), ""], start=1):
    comment = line.strip()
    if comment.startswith("#") and number not in in_string:
      block.append(comment.lstrip("#").removeprefix(" ").rstrip())
    elif block:
      yield "\n".join(block).strip("\n")
      block = []


def _is_prose(text: str) -> bool:
  """Long enough, and words rather than rules, tables and code that was commented out."""
  words = sum(c.isalpha() or c.isspace() for c in text)
  return len(text) >= SHORTEST_DOC and words >= 0.8 * len(text)


def _pieces(source: str, tree: ast.Module) -> list[str]:
  """Cuts `source` into pieces of at most about 4 KB (a longer single line stays whole); joined they are `source`."""
  statements = {min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))]) for n in tree.body}
  lines = source.split("\n")
  lines = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
  pieces, begin, size, statement, blank = [], 0, 0, 0, 0
  for i, line in enumerate(lines):
    if i + 1 in statements:
      statement = i
    elif not line.strip():
      blank = i
    size += len(line.encode("utf-8", "replace"))
    if size > PIECE_BYTES and i > begin:
      cut = next(c for c in (statement, blank, i) if c > begin)  # the best boundary since the last cut
      pieces.append("".join(lines[begin:cut]))
      begin, size = cut, sum(len(x.encode("utf-8", "replace")) for x in lines[cut : i + 1])
  return [*pieces, "".join(lines[begin:])]
