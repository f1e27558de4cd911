"""The notebooks, executed small and without network, and what documents point at."""

import json
import os
import re
import shlex
import sys
import types

import matplotlib.pyplot as plt
import pytest

from tests import commands
from tests.conftest import ENVIRONMENT, ROOT
from tests.test_run import DOCUMENTS, SMALL
from tsparse.analysis import analyze
from tsparse.data import statistics
from tsparse.evaluate import report as tasks
from tsparse.sparse import generate
from tsparse.sparse.predictors import run as predictors

METRICS = (ROOT / "docs" / "metrics.md").read_text()
WORDS = {word for quoted in re.findall(r"`([^`]+)`", METRICS) for word in re.findall(r"\w+", quoted)}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = "--config.train.steps=6 --config.base.train.steps=6"
# What takes the place of each notebook's parameters; RUNS is a folder that all have in common.
PARAMETERS = {
  "1_relufy": {"FLAGS": f"{' '.join(SMALL)} {STEPS}"},
  "2_analyze": {"FLAGS": f"{' '.join(SMALL)} {STEPS}", "ANALYSIS": "--tokens=500 --seq_len=64 --levels=0,0.5"},
  "3_sharded": {"FLAGS": f"{' '.join(SMALL)} --config.train.steps=6 --config.train.batch_size=8"},
  "4_decode": {"FLAGS": f"{' '.join(SMALL)} {STEPS}", "PREDICTORS": "--steps=2 --seq_len=64 --tokens=500"},
}


def cells(path, kind):
  return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def shell(line):
  """A `!` line: a command of ours, the end of whose output is cut off where a table begins."""
  command, _, pipe = line.partition("|")
  python, script, *arguments = shlex.split(command)
  assert python == "python" and script.startswith("experiments/"), f"{line}: not a command that runs without network"
  done = commands.run(script, *arguments, env=dict(os.environ))
  assert done.returncode == 0, f"{line}\n{done.stderr}"
  for title in re.findall(r"/\^(.*?)/", pipe):
    assert f"\n{title}" in done.stdout, f"{line}: no line begins with {title}"


def keys(value):
  """All keys of nested JSON."""
  if isinstance(value, dict):
    return set(value).union(*map(keys, value.values()))
  return set().union(*map(keys, value)) if isinstance(value, list) else set()


def numbers(folder):
  """The names of all numbers that runs have written below a folder, without those of sources."""
  found = set()
  for path in folder.rglob("metrics.jsonl"):
    for line in path.read_text().splitlines():
      found |= {re.sub("/stdlib_[a-z]*", "", key).split("/")[-1] for key in json.loads(line)}
  for path in folder.rglob("analysis.json"):
    found |= keys(json.loads(path.read_text())["models"])
  for path in folder.rglob("quality.json"):
    found |= keys(json.loads(path.read_text())["predictors"])
  return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture
def jupyter(monkeypatch):
  """What Jupyter gives to cells; returns how many pictures they have shown."""
  shown = []

  def show(*pictures):
    assert pictures or plt.gcf().axes
    shown.extend(pictures or [plt.gcf()])
    plt.close("all")

  def image(path, width):
    with open(path, "rb") as file:
      assert file.read(8) == b"\x89PNG\r\n\x1a\n" and width <= 1000
    return path

  module = types.ModuleType("IPython.display")
  module.Image, module.display = image, show
  monkeypatch.setitem(sys.modules, "IPython.display", module)
  monkeypatch.setattr(plt, "show", show)
  monkeypatch.setenv("XLA_FLAGS", ENVIRONMENT["XLA_FLAGS"])  # one device, until a notebook asks for more
  for name in ("PATH", "COLUMNS", "TTY_COMPATIBLE"):  # to have what notebooks set taken back
    monkeypatch.setenv(name, os.environ.get(name, ""))
  monkeypatch.chdir(ROOT / "notebooks")
  return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(path, runs, jupyter):
  scope, parameters = {"shell": shell, "__name__": "__main__"}, PARAMETERS[path.stem] | {"RUNS": str(runs)}
  for number, source in enumerate(cells(path, "code")):
    code = re.sub(r"^( *)!(.*)$", lambda line: f"{line[1]}shell(f{line[2]!r})", source, flags=re.MULTILINE)
    exec(compile(code, f"{path.name}, cell {number}", "exec"), scope)
    if "RUNS" in scope:  # as its own cell sets it, and then as the test does
      assert parameters.keys() <= scope.keys()
      scope |= parameters
  outputs = [out for cell in json.loads(path.read_text())["cells"] for out in cell.get("outputs", [])]
  assert len([out for out in outputs if "image/png" in out.get("data", {})]) == len(jupyter) > 1
  assert not numbers(runs) - WORDS, "docs/metrics.md says nothing of these"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_they_ran_and_small(path):
  code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
  assert path.stat().st_size < 400_000


def test_links_of_documents_and_notebooks_lead_somewhere():
  texts = {ROOT / name: [(ROOT / name).read_text()] for name in [*DOCUMENTS, "benchmarks/README.md"]}
  texts |= {path: cells(path, "markdown") for path in NOTEBOOKS}
  links = [(path, link) for path, text in texts.items() for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(text))]
  badges = [(path, link) for path, link in links if "colab.research.google.com/github" in link]
  assert [path for path, _ in badges] == NOTEBOOKS
  assert all(link.partition("/blob/main/")[2] == str(path.relative_to(ROOT)) for path, link in badges)
  for path, link in links:
    assert link.startswith(("https://", "#")) or (path.parent / link.partition("#")[0]).exists(), f"{path}: {link}"
  listed = (ROOT / "README.md").read_text()
  for path in [*(ROOT / name for name in DOCUMENTS if name != "README.md"), *NOTEBOOKS]:
    assert f"]({path.relative_to(ROOT)})" in listed, f"{path.name} is not in README.md"


def test_every_definition_of_the_code_is_in_the_document_of_metrics():
  undefined = {name for module in (analyze, predictors, generate, statistics, tasks) for name in module.DEFINITIONS}
  there = "threshold sparsity, threshold, rank, embeddings, expert_curves, data_tokens, data_epochs, data_fill"
  assert undefined - WORDS == set(there.split(", "))  # they stand there by the names they are stored under
