"""What the report says of a recipe: the gap to the control, the frontier, the trace, alarms; and a calibrated model."""

import json

import jax
import numpy as np
import pytest

from tests.recipes.test_training import one_device, small, source
from tests.train.test_step import batch
from tsparse.analysis import gap, tables
from tsparse.analysis.calibrate import calibrate
from tsparse.analysis.charts import charts
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import model_config
from tsparse.models.transformer import Transformer
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
