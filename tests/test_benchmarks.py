"""The benchmarks run, on sizes that say nothing about speed."""

import json
import subprocess
import sys

from tests.conftest import ENVIRONMENT, ROOT


def test_the_benchmark_of_experts_runs(tmp_path):
  sizes = ["--tokens=64", "--d_model=16", "--width=32", "--repeats=1", f"--json={tmp_path / 'moe.json'}"]
  done = subprocess.run(
    [sys.executable, "benchmarks/moe.py", *sizes], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "moe.json").read_text())["rows"]
  layers = ["dense FFN", "ragged", "ep_allgather", "ep_ragged_a2a", "dense"]
  assert [(row["experts"], row["layer"]) for row in rows] == [(experts, name) for experts in (8, 64) for name in layers]
  measured = [row for row in rows if row["layer"] != "ep_ragged_a2a"]  # XLA has no such collective on CPU
  assert all(row["forward_ratio"] > 0 and row["gradient_ratio"] > 0 for row in measured)
  assert done.stdout.count("cannot run on this platform") == 2
  assert done.stdout.count("ep_allgather") == 2
