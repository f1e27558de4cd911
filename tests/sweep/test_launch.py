"""Runs as processes, with a script in the place of experiments/run.py that does what one does, at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_collections
import pytest
from rich.console import Console

from tests.conftest import ENVIRONMENT, ROOT
from tsparse.errors import Stopped
from tsparse.sweep import launch
from tsparse.sweep.runs import Run

SCRIPT = """
import pathlib, signal, sys, time
flags = dict(flag.lstrip("-").split("=", 1) for flag in sys.argv[1:])
workdir, does = pathlib.Path(flags["workdir"]), flags["does"]
workdir.mkdir(parents=True, exist_ok=True)
if does == "refuse":
  sys.exit(print("error: that cannot be.") or 2)
if does == "crash":
  raise SystemExit("Killed")
if does == "wait" and not (workdir / "signals").exists():
  def stop(number, frame):
    with open(workdir / "signals", "a") as file:
      file.write(f"{number} ")
    print("stopped: the checkpoint is saved.")
    time.sleep(0.3)
    sys.exit(0 if number == signal.SIGTERM else 130)
  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  (workdir / "ready").touch()
  time.sleep(30)
(workdir / "report").mkdir()
(workdir / "report" / "analysis.json").write_text("{}")
"""


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
  path = tmp_path / "script.py"
  path.write_text(SCRIPT)
  monkeypatch.setattr(launch, "RUN", path)
  return path


def runs(folder, *does):
  return [
    Run(name, {}, (f"--does={what}", f"--workdir={folder / name}"), ml_collections.ConfigDict(), folder / name)
    for name, what in zip("abcdef", does, strict=False)
  ]


def go(found, folder, parallel=1):
  states = []
  record = lambda run, state, why: states.append((run.name, state, why))  # noqa: E731
  launch.launch(found, parallel, folder / "logs", record, Console(quiet=True))
  return states


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path):
  found = runs(tmp_path, "refuse", "finish", "crash")
  for attempt in range(2):
    states = go(found, tmp_path)
    assert [state for state in states if state[0] == "a"][-1] == ("a", "failed", "error: that cannot be.")
    assert states[-1] == ("c", "failed", "Killed")
    assert ("b", "done", "") in states if attempt == 0 else not [state for state in states if state[0] == "b"]
  assert (tmp_path / "logs" / "a.txt").read_text().count("error: ") == 2


def wait_for(*paths):
  deadline = time.monotonic() + 60
  while not all(path.exists() for path in paths) and time.monotonic() < deadline:
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_run_once_starts_no_more_and_the_sweep_goes_on_later(number, tmp_path):
  found = runs(tmp_path, "wait", "wait", "finish")

  def interrupt():
    wait_for(tmp_path / "a" / "ready", tmp_path / "b" / "ready")
    os.kill(os.getpid(), number)

  thread = threading.Thread(target=interrupt)
  thread.start()
  with pytest.raises(Stopped, match="0 of 3 runs are done") as stopped:
    go(found, tmp_path, parallel=2)
  thread.join()
  assert stopped.value.exit_code == (130 if number == signal.SIGINT else 0)
  assert [(tmp_path / name / "signals").read_text() for name in "ab"] == [f"{int(number)} "] * 2
  assert not (tmp_path / "c").exists()

  states = go(found, tmp_path, parallel=3)
  assert sorted(state[:2] for state in states if state[1] == "done") == [(name, "done") for name in "abc"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part of it is Linux's")
def test_runs_save_themselves_when_the_sweep_is_killed(tmp_path, script):
  code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from tests.sweep import test_launch as here
here.launch.RUN = Path({str(script)!r})
here.go(here.runs(Path({str(tmp_path)!r}), "wait"), Path({str(tmp_path)!r}))
"""
  sweep = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT)
  wait_for(tmp_path / "a" / "ready")
  sweep.kill()
  sweep.wait()
  wait_for(tmp_path / "a" / "signals")
  assert (tmp_path / "a" / "signals").read_text() == f"{int(signal.SIGTERM)} "


def test_how_a_run_ended_is_told_in_its_own_words(tmp_path):
  (run,) = runs(tmp_path, "finish")
  log = tmp_path / "a.txt"
  log.write_text("step 1\nfailed: the loss is not finite.\nat exit\n")
  assert launch.outcome(run, 1, tmp_path) == ("failed", "failed: the loss is not finite.")
  assert launch.outcome(run, -9, tmp_path)[1].startswith("killed by SIGKILL; its last words: failed")
  log.write_text("")
  assert launch.outcome(run, 0, tmp_path) == ("stopped", "it printed nothing")
  Path(run.workdir, "report").mkdir(parents=True)
  Path(run.workdir, "report", "analysis.json").write_text(json.dumps({}))
  assert launch.outcome(run, 0, tmp_path) == ("done", "")
