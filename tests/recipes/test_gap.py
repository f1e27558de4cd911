"""What the report says of a recipe: the gap to the control, the frontier, the trace, alarms; and a calibrated model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.recipes.test_training import one_device, small, source
from tests.train.test_step import batch
from tsparse import files
from tsparse.analysis import gap, tables
from tsparse.analysis.calibrate import calibrate
from tsparse.analysis.charts import charts
from tsparse.analysis.plots import draw_beside
from tsparse.errors import UserError
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import model_config
from tsparse.models.transformer import Transformer
from tsparse.recipes.recipe import recipe_of
from tsparse.sweep import gather, runs
from tsparse.train.log import trace


def model(name, loss, zeros, **more):
  return {
    "name": name, "activation": "drelu" if zeros else "swiglu", "loss": loss, "perplexity": np.exp(loss), "data": "d",
    "zero_fraction": {"mean": zeros, "per_layer": [zeros, zeros], "per_expert": [[zeros], [zeros]]}, **more,
  }  # fmt: skip


def test_gaps_are_to_the_control_whatever_the_order():
  models = [
    model("base", 1.38, 0.0),
    model("control", 1.39, 0.0, thresholds={"cats": [{"sparsity": 0.5, "loss": 1.6}]}),
    model("recovered", 1.49, 0.87, curve=[{"sparsity": 0.9, "loss": 1.55, "perplexity": 4.7}]),
  ]
  pair = lambda a, b, d: {"models": [a, b], "difference": d, "interval": [d - 0.01, d + 0.02]}  # noqa: E731
  forward, backward = pair("control", "recovered", 0.1), pair("recovered", "control", -0.1)
  for comparison, bounds in ((forward, [0.09, 0.12]), (backward, [0.08, 0.11])):
    ((found, difference, interval),) = gap.gaps(models, [pair("base", "control", 0.01), comparison])
    assert found["name"] == "recovered" and difference == pytest.approx(0.1) and interval == pytest.approx(bounds)
  (table,) = tables.above_control(models, [forward])
  assert table.rows == [["recovered", "87.0%", "+0.1000", "+0.0900 to +0.1200"]]
  points = {(m["name"], how): points for m, how, points in gap.frontier(models)}
  assert points["recovered", "as it is"] == [[0.87, pytest.approx(0.1)]]
  assert points["control", "cats"] == [[0.5, pytest.approx(0.21)]] and ("recovered", "top-k") in points
  assert not list(gap.gaps(models[:1], [])) and not list(gap.frontier(models[:1]))


GRID = str(ROOT / "configs" / "ablations" / "recipes.py")


def test_the_grid_is_a_sweep_over_the_recipes_of_its_config():
  rows = runs.expand(GRID, (), runs.stated(GRID), False, Path("nowhere"))
  assert len({run.config.to_json() for run in rows}) == len(rows) > 20
  assert all(recipe_of(run.config) and run.config.control.train.learning_rate == 5e-4 for run in rows)
  assert rows[0].arguments == (f"--config={GRID}:plain", f"--workdir={rows[0].workdir}") and rows[0].title == "plain"
  assert rows[0].workdir == Path("nowhere/config=plain")
  for sweep, sentence in (("config=kl,no", "the recipes are plain, plain_4e-3"), ("confg=kl", "no field 'confg'")):
    with pytest.raises(UserError, match=sentence):
      runs.expand(GRID, (), [sweep], False, Path("nowhere"))
  with pytest.raises(UserError, match="--config is swept and set for all runs"):
    runs.expand(f"{GRID}:kl", (), ["config=kl,plain"], False, Path("nowhere"))


def test_a_sweep_with_controls_shows_what_the_zeros_of_each_run_cost(tmp_path):
  rows = runs.expand(GRID, (), ["config=plain,kl,log_87"], False, tmp_path)
  for run, loss in zip(rows[:2], (1.54, 1.49), strict=True):
    models = [model("control", 1.39, 0.0), model("recovered", loss, 0.7)]
    pair = {"models": ["control", "recovered"], "difference": loss - 1.39, "interval": [loss - 1.40, loss - 1.37]}
    (run.workdir / "report").mkdir(parents=True)
    files.write(run.workdir / "report" / "analysis.json", files.to_json({"models": models, "comparisons": [pair]}))
  found = {run.name: gather._models(run) for run in rows[:2]}
  states = {run.name: (run.state, "") for run in rows}
  table = gather.table(rows, found, states)
  column = table.columns.index("loss above control")
  assert [row[column] for row in table.rows] == ["+0.150 ±0.015", "+0.100 ±0.015", ""]
  assert all(len(row) == len(table.columns) for row in table.rows)
  heading, *lines = gather.csv_rows(rows, found, states)
  costs = [line[heading.index("loss_above_control")] for line in lines]
  assert costs == [None, pytest.approx(0.15), None, pytest.approx(0.1), ""]  # a control, a model, twice; one to come
  assert all(len(line) == len(heading) for line in lines)
  chart = gather.frontier([found[run.name][-1] | {"name": run.title} for run in rows[:2]])
  assert [(s.model, s.points[0][0], round(s.points[0][1], 3)) for s in chart.views[0].data] == [
    ("plain", 0.7, 0.15), ("kl", 0.7, 0.1),
  ]  # fmt: skip
  figure = draw_beside([chart], [["plain", "kl"]], height=5, width=9)
  assert {text.get_text() for text in figure.axes[0].texts} == {"plain", "kl"}
  assert gather.frontier([model("plain", 1.5, 0.7)]) is None


def test_runs_that_have_read_more_or_less_than_the_others_are_named():
  read = {"a": 100, "b": 100, "c": 100, "d": 100, "e": 25}
  models = [model(name, 1.5, 0.7, trained_tokens=n, gap=(0.1, None)) for name, n in read.items()]
  assert [s.model for s in gather.frontier(models).views[0].data] == ["a", "b", "c", "d", "e (25 tokens)"]
  assert tables.notes({"models": models})[-1].startswith("Tokens seen differ (e 25, the others 100)")
  assert tables.notes({"models": models[2:]})[-1].startswith("Tokens seen differ (c 100, d 100, e 25)")


def test_the_trace_is_drawn_by_layer_where_layers_are_steered_alone(tmp_path):
  steered = {"zeros_wanted": [0.8, 0.9], "zero_fraction": 0.7}
  lines = [{"step": i, "loss": 2.0 - i / 10, "penalty_weight": [1e-3, i], **steered} for i in range(1, 6)]
  text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 5, "validation_loss": 1.0}])
  (tmp_path / "metrics.jsonl").write_text(text)
  found = trace(tmp_path)
  assert found["step"] == [1, 2, 3, 4, 5] and "distillation" not in found
  chart = next(c for c in charts({"models": [model("recovered", 1.5, 0.9, training=found)]}) if c.key == "training")
  weights = next(view for view in chart.views if "lambda" in view.name)
  assert [series.label for series in weights.data] == ["penalty_weight 0", "penalty_weight 1"]
  assert weights.data[1].points == [[i, i] for i in range(1, 6)]


def test_alarms_are_sentences_under_the_tables():
  bad = model("recovered", 1.5, 0.5, dead_neurons={"count": 30, "total": 100})
  bad["zero_fraction"] |= {"per_layer": [0.5, 1.0], "per_expert": [[0.5, None], [1.0, 1.0]]}
  told = " ".join(tables.notes({"models": [bad]}))
  assert "all zeros (1)" in told and "30 neurons of 100" in told and "layer.expert 0.1" in told
  assert not list(tables.alarms(model("recovered", 1.5, 0.5, dead_neurons={"count": 1, "total": 100})))


def test_calibrated_thresholds_are_parameters_that_give_the_zeros_asked_for():
  config, mesh = small(), one_device()
  decoder, rows = Transformer(model_config(config)), [batch(i) for i in range(2)]
  with jax.set_mesh(mesh):
    params = source(config).restore(None)[0]
    found = calibrate(decoder, params, rows, mesh, 0.88)
    assert set(found.theta) == {"ffn"} and found.theta["ffn"].shape == (2,)
    params["layers"]["ffn"]["threshold"] = jax.numpy.asarray(found.theta["ffn"])
    config.model.hidden_thresholds = True
    thresholded = evaluate(Transformer(model_config(config)), params, rows, mesh)
  assert thresholded.zero_fraction == pytest.approx(0.88, abs=0.01)
  assert np.mean(found.zeros) == pytest.approx(thresholded.zero_fraction, abs=1e-3)
