"""Compiles C++ with the system's compiler, once for each machine, source and jaxlib, and makes it known to XLA.

A source is one .cc file beside what only it includes (.inc); the headers here are for all of them.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# No -march: the best instructions are chosen when the code runs, so a cache folder may be shared between machines.
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-pthread")
# Instruction sets, as in machine.h; the best that the machine has, up to the level given, is used.
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2}
BEST = LEVELS["avx512"]


class BuildError(Exception):
  """There is no library; the message says why."""


def compiler() -> str | None:
  """Path of $CXX, or of the first of c++, g++ and clang++ that is there."""
  asked = os.environ.get("CXX")
  return next(filter(None, map(shutil.which, [asked] if asked else ["c++", "g++", "clang++"])), None)


def cache_folder() -> Path:
  """$TSPARSE_CACHE, or tsparse in the user's cache folder."""
  base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return Path(os.environ.get("TSPARSE_CACHE") or Path(base) / "tsparse")


def library(source: Path, cache: Path) -> Path:
  """`source` compiled, built if it is not in the folder `cache` yet.

  Several processes may build at once: each writes a file of its own, and the last to finish puts an equal one in place.

  Raises:
    BuildError: no compiler, or it failed, or the folder cannot be written.
  """
  import jax.ffi
  import jaxlib.version

  cxx = compiler()
  if cxx is None:
    raise BuildError("no C++ compiler was found (set CXX, or install g++ or clang++)")
  texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.inc")), *sorted(HERE.glob("*.h")))]
  try:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    key = [*texts, jaxlib.version.__version__, version, platform.machine(), *FLAGS]
    target = cache / f"{source.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if target.exists():
      return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
      built = Path(scratch) / target.name
      include = ("-I", str(HERE), "-I", str(source.parent), "-isystem", jax.ffi.include_dir())
      subprocess.run([cxx, *FLAGS, *include, str(source), "-o", str(built)], capture_output=True, check=True)
      built.replace(target)
  except subprocess.CalledProcessError as error:
    last = (error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")).strip()
    raise BuildError(f"{cxx} failed ({last.splitlines()[0] if last else error})") from error
  except OSError as error:
    raise BuildError(f"they could not be built in {cache} ({error.strerror})") from error
  return target


def register(source: Path, handlers: Sequence[str]):
  """Makes those functions of `source` known to XLA, for CPUs, under their names.

  Raises:
    BuildError: see `library`.
  """
  import jax.ffi

  shared = ctypes.CDLL(str(library(source, cache_folder())))
  for name in handlers:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(shared, name)), platform="cpu")
