"""Tests run on 8 virtual CPU devices; set before JAX is imported."""

import os
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

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
