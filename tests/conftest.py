"""Tests run on 8 virtual CPU devices; set before JAX is imported."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

# What one test or command has compiled, the next of this session loads: half of a small run is compilation.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tsparse_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Of commands in subprocesses: one device.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shared_data():
  """The folder of real text and models that tests use when it is there."""
  folder = Path(os.environ.get("TSPARSE_TEST_DATA", ROOT.parent / "shared" / "data"))
  if not folder.is_dir():
    pytest.skip(f"no test data at {folder}; set TSPARSE_TEST_DATA")
  return folder
