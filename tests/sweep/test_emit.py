"""A sweep for other schedulers: what their own parsers read out of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tsparse.sweep.emit import EMITTERS
from tsparse.sweep.runs import expand

HOSTILE = """config.data.train='$(touch broken); "`touch broken`" a,b',"it's \\ ; rm -rf ~ # %d {x}" """
STAND_IN = """
import json, pathlib, sys
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[2:])
with open("calls", "a") as file:
  file.write(json.dumps(sys.argv[2:]) + "\\n")
sys.exit("1" in flags["config.seed"])
"""


@pytest.fixture
def found(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  runs = expand("configs/tiny_drelu.py", (), [HOSTILE, "config.seed=1,2"], False, tmp_path / "with space; $x")
  assert runs[0].config.data.train == '$(touch broken); "`touch broken`" a,b'
  monkeypatch.chdir(tmp_path)
  return runs


def emit(kind, found, parallel=1):
  return EMITTERS[kind](found, "my sweep\n; x", parallel, ROOT / "launch" / "jobset.yaml")


def bash(script, tmp_path, **variables):
  """Runs a script with a python that notes its arguments, one list a line."""
  python = tmp_path / "python"
  (tmp_path / "stand_in.py").write_text(STAND_IN)
  python.write_text(f'#!/bin/sh\nexec {sys.executable} stand_in.py "$@"\n')
  python.chmod(0o755)
  assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
  done = subprocess.run(
    ["bash"], input=script, text=True, cwd=tmp_path, env=os.environ | {"PYTHON": str(python)} | variables
  )
  assert not (tmp_path / "broken").exists()
  return done.returncode, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_the_shell_script_runs_each_run_that_is_not_done_with_its_words_as_they_are(found, tmp_path):
  report = found[1].workdir / "report"
  report.mkdir(parents=True)
  (report / "analysis.json").touch()
  code, calls = bash(emit("shell", found), tmp_path)
  assert calls == [list(run.arguments) for run in (found[0], *found[2:])] and code == 1  # seed 1 fails, the rest runs


def test_a_task_of_the_slurm_array_is_one_run(found, tmp_path):
  script = emit("slurm", found, parallel=2)
  directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
  assert "#SBATCH --array=0-3%2" in directives and "#SBATCH --job-name=my-sweep-x" in directives
  assert len(directives) == 5 and script.startswith("#!/usr/bin/env bash\n#")
  assert bash(script, tmp_path, SLURM_ARRAY_TASK_ID="3") == (0, [list(found[3].arguments)])


def test_jobsets_are_the_pattern_with_another_name_and_command(found, tmp_path):
  pattern = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
  documents = list(yaml.safe_load_all(emit("jobset", found)))
  assert [document["metadata"]["name"] for document in documents] == [f"my-sweep-x-{i}" for i in range(4)]
  for run, document in zip(found, documents, strict=True):
    assert document["metadata"]["annotations"].pop("tsparse/run") == run.name
    (job,) = document["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    words = [word.replace("$$", "$") for word in container["command"]]  # as Kubernetes does
    assert words == ["python", "experiments/run.py", *run.arguments]
    (theirs,) = pattern["spec"]["replicatedJobs"]
    container["command"] = theirs["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    document["metadata"]["name"] = pattern["metadata"]["name"]
    assert document == pattern
  assert Path(tmp_path / "broken").exists() is False
