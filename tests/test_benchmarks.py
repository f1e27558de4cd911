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
  layers = ["dense FFN", "ragged", "ep_allgather", "dense"]
  assert [(row["experts"], row["layer"]) for row in rows] == [(experts, name) for experts in (8, 64) for name in layers]
  assert all(row["forward_ratio"] > 0 and row["gradient_ratio"] > 0 for row in rows)
  assert done.stdout.count("ep_allgather") == 2


def test_the_benchmark_of_the_analysis_runs(tmp_path):
  sizes = ["--tokens=16", "--layers=1", "--d_model=128", "--d_ff=64", "--repeats=1", f"--json={tmp_path / 'a.json'}"]
  done = subprocess.run(
    [sys.executable, "benchmarks/analysis.py", *sizes], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  rows = {row["what"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
  assert rows["plain"]["ratio"] == 1 and rows["sweep of 10 levels"]["forwards"] == 10 and len(rows) == 6
  assert "masked by contribution" in done.stdout
