"""Tests run on 8 virtual CPU devices; set before JAX is imported."""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Half of the suite is compilation: programs that are less optimised save a quarter of its time.
LESS_OPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {LESS_OPTIMISED} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

# What one test or command has compiled, the others of this session load, those of pytest-xdist's other workers too.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tsparse_compiled_")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(20 << 30)  # any limit makes JAX lock the folder

# Of commands in subprocesses: one device.
ENVIRONMENT = os.environ | {"XLA_FLAGS": LESS_OPTIMISED}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shared_data():
  """The folder of real text and models that tests use when it is there."""
  folder = Path(os.environ.get("TSPARSE_TEST_DATA", ROOT.parent / "shared" / "data"))
  if not folder.is_dir():
    pytest.skip(f"no test data at {folder}; set TSPARSE_TEST_DATA")
  return folder


MUCH_MEMORY = 2 << 30  # bytes of a worker; the largest file of tests adds less than as much again


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
  """Has a worker that grew forget its compiled programs after a file of tests: the cache on disk still has them."""
  yield
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  if "jax" in sys.modules and pages * os.sysconf("SC_PAGE_SIZE") > MUCH_MEMORY:
    sys.modules["jax"].clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
