"""The benchmarks run, on sizes that say nothing about speed."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ENVIRONMENT, ROOT


def test_the_benchmark_of_experts_runs(tmp_path):
  sizes = ["--tokens=64", "--d_model=16", "--width=32", "--repeats=1", f"--json={tmp_path / 'moe.json'}"]
  done = subprocess.run(
    [sys.executable, "benchmarks/moe.py", *sizes], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "moe.json").read_text())["rows"]
  layers = ["dense FFN", "ragged", "ep_allgather", "dense"]
  assert [(row["experts"], row["layer"]) for row in rows] == [(experts, name) for experts in (8, 64) for name in layers]
  assert all(row["forward_ratio"] > 0 and row["gradient_ratio"] > 0 for row in rows)
  assert done.stdout.count("ep_allgather") == 2


def test_the_benchmark_of_decoding_runs_and_its_modes_agree(tmp_path):
  sizes = ["--shapes=tiny,tiny_moe", "--layers=2", "--tokens=5", "--nopeers", f"--json={tmp_path / 'decode.json'}"]
  done = subprocess.run(
    [sys.executable, "benchmarks/decode.py", *sizes], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )
  if "cannot be built here" in done.stderr:
    pytest.skip("no C++ compiler")
  assert done.returncode == 0, done.stderr
  fields = json.loads((tmp_path / "decode.json").read_text())
  assert fields.keys() >= {"speedup_over_dense", "ideal", "bandwidth_share", "peers"}
  assert fields["ideal"].keys() == {"dense", "exact", "predictor"} and fields["ideal"]["predictor"] > 1
  assert [result["shape"] for result in fields["results"]] == ["tiny", "tiny_moe"]


def test_the_break_even_of_skipping_is_measured(tmp_path):
  arguments = ["--preset=tiny", "--repeats=1", f"--json={tmp_path / 'rows.json'}"]
  done = subprocess.run(
    [sys.executable, "benchmarks/break_even.py", *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )
  if "cannot be built here" in done.stderr:
    pytest.skip("no C++ compiler")
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
  assert len(rows) == 24 and all(row["ratio"] > 0 for row in rows)
  assert rows[0]["bytes"] == 1 and rows[-4]["bytes"] < 0.5
