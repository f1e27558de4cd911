"""experiments/sweep.py from end to end, on real runs of a very small model, and the results side by side."""

import csv
import io
import json
import math
import shutil

import pytest
from rich.console import Console

from tests import commands
from tests.conftest import ENVIRONMENT
from tsparse import files
from tsparse.sweep import gather, runs, sweep

SMALL = [
  "--config.model.num_layers=1", "--config.model.d_model=16", "--config.model.d_ff=32", "--config.model.head_dim=8",
  "--config.train.seq_len=32", "--config.train.batch_size=4", "--config.data.lanes=4", "--config.train.warmup_steps=2",
  "--config.train.steps=6", "--config.train.eval_every=3", "--config.analysis.tokens=500",
  "--config.analysis.levels=(0.0,0.9)",
]  # fmt: skip


def analysis(folder, name):
  return json.loads((folder / name / "report" / "analysis.json").read_text())["models"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """The folder of a sweep of two runs, one of which cannot be, and what the command said."""
  folder = tmp_path_factory.mktemp("sweep")
  text = folder / "text.jsonl"
  text.write_text("".join(f'{{"text": "{i} bottles of beer on the wall"}}\n' for i in range(200)))
  done = commands.run(
    "experiments/sweep.py", "--config=configs/tiny_drelu.py", "--sweep=config.activation=dreul,drelu", *SMALL,
    f"--config.data.train={text}", "--config.wandb=sweeps", f"--workdir={folder / 'runs'}",
    env=ENVIRONMENT | {"WANDB_MODE": "offline"},
  )  # fmt: skip
  return folder / "runs", done


def rows(folder):
  with (folder / "sweep.csv").open() as file:
    return {row["run"]: row for row in csv.DictReader(file)}


def test_results_of_what_ran_are_gathered_and_what_failed_is_named(swept):
  folder, done = swept
  assert done.returncode == 1 and "activation=dreul among them (error: activation 'dreul' is unknown" in done.stderr
  found, (model,) = rows(folder), analysis(folder, "activation=drelu")
  assert {name: row["state"] for name, row in found.items()} == {
    "activation=dreul": "failed", "activation=drelu": "done",
  }  # fmt: skip
  assert "Did you mean 'drelu'?" in found["activation=dreul"]["why"] and found["activation=dreul"]["loss"] == ""
  row = found["activation=drelu"]
  assert (row["config.activation"], float(row["loss"])) == ("drelu", model["loss"])
  assert float(row["zero_fraction"]) == model["zero_fraction"]["mean"]
  assert float(row["perplexity_masked_0.9"]) == model["curve"][-1]["perplexity"]
  assert f"{model['loss']:.3f}" in done.stdout and (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
  recorded = json.loads((folder / "sweep.json").read_text())["runs"]
  assert [(run["name"], run["state"], run["why"]) for run in recorded] == [
    (name, row["state"], row["why"]) for name, row in found.items()
  ]
  assert len(list((folder / "activation=drelu" / "wandb").glob("offline-run-*"))) == 1


@pytest.fixture
def grid(swept):
  """Six runs as if they were done: their report is that of the one that is, their losses are 1 to 6."""
  folder, _ = swept
  fields = ["config.activation=relu,drelu", "config.train.learning_rate=1e-3,1e-2,1e-1"]
  found = runs.expand("configs/tiny_drelu.py", SMALL, fields, False, folder.parent / "grid")
  whole = json.loads((folder / "activation=drelu" / "report" / "analysis.json").read_text())
  for loss, run in enumerate(found, start=1):
    models = [whole["models"][0] | {"loss": loss, "perplexity": math.exp(loss)}]
    (run.workdir / "report").mkdir(parents=True, exist_ok=True)
    files.write(run.workdir / "report" / "analysis.json", files.to_json(whole | {"models": models}))
    shutil.copy(folder / "activation=drelu" / "metrics.jsonl", run.workdir)
  return found


def test_gathering_runs_nothing_and_puts_what_is_there_side_by_side(grid):
  folder, console = grid[0].workdir.parent, Console(record=True, width=100, file=io.StringIO())
  sweep.run(grid, folder, only_gather=True, console=console)
  assert [float(row["loss"]) for row in rows(folder).values()] == [1, 2, 3, 4, 5, 6]
  reported = json.loads((folder / "report" / "analysis.json").read_text())["models"]
  assert [m["name"] for m in reported] == [run.title for run in grid]
  assert reported[0]["name"] == "relu, learning_rate=0.001" and "403.43" in console.export_text()  # e^6


def test_numbers_that_are_swept_are_axes_and_the_rest_lines(grid):
  models = [analysis(run.workdir.parent, run.name)[-1] | {"name": run.title} for run in grid]
  perplexity, zeros, learning = gather.charts(grid, models)
  chart, names = perplexity
  (view,) = chart.views
  assert names == zeros[1] == ["relu", "drelu"] and view.x.label == "learning_rate" and chart.kind == "lines"
  assert [[x for x, _ in series.points] for series in view.data] == [[0.001, 0.01, 0.1]] * 2
  assert [round(math.log(y)) for series in view.data for _, y in series.points] == [1, 2, 3, 4, 5, 6]
  tokens = [x for x, _ in learning[0].views[0].data[0].points]
  assert learning[1] == [run.title for run in grid] and tokens == [3 * 4 * 32, 6 * 4 * 32]
  assert next(gather.charts(grid[::3], models[::3]))[0].kind == "intervals"  # two activations, one learning rate
