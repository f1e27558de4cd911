"""Compiles kernels.cc with the system's C++ compiler, once for each machine, source and jaxlib."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cc", "rows.inc"))
# No -march: the best instructions are chosen when the kernels run, so a cache folder may be shared between machines.
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-pthread")


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


def library(cache: Path) -> Path:
  """The compiled kernels, built if they are not in the folder `cache` yet.

  Several processes may build at once: each writes a file of its own, and the last to finish puts an equal one in place.

  Raises:
    BuildError: no compiler, or it failed, or the folder cannot be written.
  """
  import jax.ffi
  import jaxlib.version

  cxx = compiler()
  if cxx is None:
    raise BuildError("no C++ compiler was found (set CXX, or install g++ or clang++)")
  try:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    key = [*(path.read_text() for path in SOURCES), jaxlib.version.__version__, version, platform.machine(), *FLAGS]
    target = cache / f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if target.exists():
      return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
      built = Path(scratch) / target.name
      include = ("-isystem", jax.ffi.include_dir())
      subprocess.run([cxx, *FLAGS, *include, str(SOURCES[0]), "-o", str(built)], capture_output=True, check=True)
      built.replace(target)
  except subprocess.CalledProcessError as error:
    last = (error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")).strip()
    raise BuildError(f"{cxx} failed ({last.splitlines()[0] if last else error})") from error
  except OSError as error:
    raise BuildError(f"they could not be built in {cache} ({error.strerror})") from error
  return target


@functools.cache
def available() -> bool:
  """Whether the native kernels can be used; says once, in one line on stderr, if they cannot and why."""
  from tsparse.sparse.kernels import native

  try:
    native.load(library(cache_folder()))
  except BuildError as error:
    say_fallback("native", str(error))
    return False
  return True


def say_fallback(kind: str, reason: str):
  """One line on stderr: there are no kernels of that kind, and why."""
  print(f"{kind} kernels are not used: {reason}; decoding runs in jnp, where zeros save no time.", file=sys.stderr)
