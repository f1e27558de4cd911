"""Weights & Biases, offline: what its own reader finds in the files."""

import json

import pytest

from configs import tiny_drelu
from tsparse.errors import UserError
from tsparse.train import tracker
from tsparse.train.log import MetricWriter
from tsparse.train.tracker import Tracker, check_installed

wandb = pytest.importorskip("wandb")


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  config = tiny_drelu.get_config()
  config.wandb = "sparse"
  return config


def records(folder):
  """The records of the one offline run in a folder."""
  from wandb.proto.wandb_internal_pb2 import Record
  from wandb.sdk.internal.datastore import DataStore

  (path,) = folder.glob("wandb/offline-run-*/*.wandb")
  store = DataStore()
  store.open_for_scan(str(path))
  found = []
  while data := store.scan_data():
    found.append(Record())
    found[-1].ParseFromString(data)
  return found


def test_the_numbers_of_every_step_are_in_the_offline_run(config, tmp_path):
  warnings = []
  writer = MetricWriter(tmp_path, 0, warnings.append, Tracker(tmp_path, config, warnings.append))
  writer.write(1, {"loss": 2.0, "zeros_by_layer": [0.5, 0.6]})
  writer.write(1, {"validation_loss": 2.5})
  writer.write(2, {"loss": float("nan")})
  writer.write(3, {"loss": 1.0})
  writer.close()

  found = records(tmp_path)
  steps = {}
  for record in found:
    if record.WhichOneof("record_type") == "history":
      items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
      steps[items["_step"]] = {name: x for name, x in items.items() if not name.startswith("_")}
  assert steps == {1: {"loss": 2.0, "validation_loss": 2.5}, 2: {}, 3: {"loss": 1.0}}
  (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
  assert (run.project, run.display_name, run.run_group) == ("sparse", str(tmp_path), "tiny_drelu")
  assert run.run_id == json.loads((tmp_path / "wandb.json").read_text())["id"]
  logged = {item.key: json.loads(item.value_json) for item in run.config.update}
  assert logged["activation"] == "drelu" and logged["train"]["steps"] == config.train.steps and not warnings


@pytest.mark.parametrize("error", ["UsageError", "CommError"])
def test_a_service_that_cannot_be_reached_stops_no_training_and_one_that_is_not_set_up_does(
  error, config, tmp_path, monkeypatch
):
  def refuse(**_):
    raise getattr(wandb.errors, error)("No API key configured.\nUse it.")

  monkeypatch.setattr(wandb, "init", refuse)
  warnings = []
  if error == "UsageError":
    with pytest.raises(UserError, match=r"\(No API key configured\): run `wandb login`"):
      Tracker(tmp_path, config, warnings.append)
  else:
    run = Tracker(tmp_path, config, warnings.append)
    run.write(1, {"loss": 1.0})
    run.close()
    assert len(warnings) == 1 and "training goes on without it" in warnings[0]


def test_a_project_without_the_package_is_refused(monkeypatch):
  monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
  check_installed("")
  with pytest.raises(UserError, match="pip install -r requirements-wandb.txt"):
    check_installed("sparse")
