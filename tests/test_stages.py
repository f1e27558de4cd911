"""Phases: what they make of a config, what is refused, and two-phase runs end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import bamboo, mistral_drelu_sft, repeat, tiny_drelu, tiny_relufy
from tests import test_experiment
from tests.test_experiment import quiet, small
from tsparse import experiment
from tsparse.convert.leaf import whole
from tsparse.convert.model import open_model
from tsparse.errors import RunFailure, UserError
from tsparse.stages import describe_phase, stages_of
from tsparse.train.loop import data_seed

text = test_experiment.text  # the fixture


def with_phases(config, order, **phases):
  config.phases = ConfigDict({"order": order, **phases})
  return config


def test_a_phase_is_the_config_but_for_what_it_states():
  config = bamboo.get_config()
  main, phase = stages_of(config, Path("w"))
  assert (main.folder, phase.folder, phase.init) == (Path("w"), Path("w/phases/math_and_code"), Path("w"))
  for stage, tokens in ((main, 150e9), (phase, 50e9)):
    train = stage.config.train
    assert 0 <= train.steps * train.batch_size * train.seq_len - tokens < train.batch_size * train.seq_len
  said = main.config.train, phase.config.train
  assert [(t.learning_rate, t.seq_len, t.weight_decay) for t in said] == [(5e-5, 2048, 0.1), (5e-6, 4096, 0.01)]
  assert phase.config.train.b2 == main.config.train.b2 and "phases" not in phase.config
  assert "50,000,000,000 rounded up" in describe_phase(phase, config)
  assert stages_of(mistral_drelu_sft.get_config(), Path("w"))[-1].config.data.train == "turbosparse_sft"


def test_phases_come_in_the_order_that_is_given():
  config = with_phases(tiny_relufy.get_config(), "z,a", a={"tokens": 99_999}, z={"train": {"steps": 60}}, b={})
  assert [stage.name for stage in stages_of(config, Path("w"))] == ["base", "main", "z", "a"]
  assert [stage.init for stage in stages_of(config, Path("w"))] == [
    None, Path("w/base"), Path("w"), Path("w/phases/z"),
  ]  # fmt: skip
  config.phases.order = ""
  assert [stage.name for stage in stages_of(config, Path("w"))] == ["base", "main"]


@pytest.mark.parametrize(
  ("order", "phase", "sentence"),
  [
    ("sft,b", {}, "names 'b', which config.phases does not state .it states sft"),
    ("sft,sft", {}, "names 'sft' twice"),
    ("order", {}, "names 'order'"),
    ("sft", {"mesh": {"data": 1}}, "config.phases.sft.mesh: a phase states data, train and tokens"),
    (
      "sft",
      {"train": {"step": 5}},
      "sft.train.step: there is no such field; the nearest is config.phases.sft.train.steps",
    ),
    ("sft", {"train": {"steps": "many"}}, "sft.train.steps is 'many', a str, and int belongs there"),
    ("sft", {"train": {"steps": 5}, "tokens": 999}, "both tokens and train.steps"),
    ("sft", {"tokens": 255}, "sft.tokens is 255, which is no whole step of 8 x 32 tokens: set it to 256 or more"),
    ("sft", {"data": {"vocabulary": "bytes"}}, "all phases of a model have the vocabulary"),
    ("sft", {"data": {"train": "nothing.jsonl"}}, "config.phases.sft: Cannot read nothing.jsonl"),
    ("sft", {"train": {"steps": 0}}, "config.phases.sft: config.train.steps is 0"),
    ("sft", {"train": {"seq_len": 513}}, "config.phases.sft: config.train.seq_len is 513"),
  ],
)
def test_a_bad_phase_is_refused_before_anything_is_written(order, phase, sentence, text, tmp_path):
  config = with_phases(small(text), order, sft=phase)
  with pytest.raises(UserError, match=sentence):
    experiment.run(config, tmp_path / "run", quiet())
  assert not (tmp_path / "run").exists()


def test_a_phase_whose_train_would_be_shadowed_by_the_mixture_is_refused(text):
  config = with_phases(small(text), "sft", sft={"data": {"train": str(text)}})
  config.data.mixture = f"{text}:1"
  with pytest.raises(UserError, match="set config.phases.sft.data.mixture, to '' for no mixture"):
    stages_of(config, Path("w"))
  config.phases.sft.data.mixture = ""
  assert not stages_of(config, Path("w"))[-1].config.data.mixture


def records(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["loss"], line["grad_norm"], line["tokens_seen"]) for line in lines if "loss" in line]


def test_a_run_in_phases_on_conversations_resumes_and_reports_each(text, tmp_path, monkeypatch):
  chats = tmp_path / "chats.jsonl"
  chats.write_text(
    "".join(json.dumps({"instruction": f"say {i}", "output": f"the cat sat {i}"}) + "\n" for i in range(200))
  )

  def config():
    return with_phases(
      small(text, tiny_drelu),
      "sft,last",
      sft={"tokens": 10 * 8 * 32 - 7, "data": {"train": f"chat:{chats}"}, "train": {"learning_rate": 1e-3}},
      last={"train": {"steps": 3, "seq_len": 16}, "data": {"mixture": f"{text}:0.5,chat:{chats}:0.5"}},
    )

  once, killed = tmp_path / "once", tmp_path / "killed"
  analysis = experiment.run(config(), once, quiet())

  # killed in the second of three stages, after a checkpoint
  seen = []

  def account(tallies):
    seen.append(None)
    if len(seen) == 12 + 8:
      raise RunFailure("killed")
    return {}

  with monkeypatch.context() as patch, pytest.raises(RunFailure, match="killed"):
    patch.setattr("tsparse.train.loop.account_metrics", account)
    experiment.run(config(), killed, quiet())
  assert not (killed / "report").exists() and not (killed / "phases" / "last" / "checkpoints").exists()
  again = experiment.run(config(), killed, quiet())
  for folder in (".", "phases/sft", "phases/last"):
    assert records(once / folder) == records(killed / folder)
  assert [model["loss"] for model in again["models"]] == [model["loss"] for model in analysis["models"]]
  expected = parameters_of(once / "phases" / "last")
  for path, values in parameters_of(killed / "phases" / "last").items():
    np.testing.assert_array_equal(values, expected[path])

  # each phase starts where the one before ended, with other batches and its own schedule
  assert [step for step, *_ in records(once / "phases/sft")] == list(range(1, 11))
  assert [seen for *_, seen in records(once / "phases/last")] == [22 * 256 + 8 * 16 * n for n in (1, 2, 3)]
  assert json.loads((once / "phases/last/init.json").read_text())["model"] == str(once / "phases/sft")
  assert len({data_seed(0, tokens) for tokens in (0, 12 * 256, 22 * 256)}) == 3

  assert [model["name"] for model in analysis["models"]] == ["trained", "sft", "last"]
  assert [model["trained_tokens"] for model in analysis["models"]] == [12 * 256, 22 * 256, 22 * 256 + 3 * 128]
  trained, sft, last = ({source["name"]: source for source in model["sources"]} for model in analysis["models"])
  assert set(sft) == {f"chat:{chats}", str(text)}
  assert sft[f"chat:{chats}"]["loss"] < trained[f"chat:{chats}"]["loss"]
  drawn = {name: [source["name"] for source in sources] for name, sources in analysis["phases"].items()}
  assert drawn == {"sft": [f"chat:{chats}"], "last": [str(text), f"chat:{chats}"]}
  tables = json.loads((once / "report" / "summary.json").read_text())["tables"]
  shown = next(table for table in tables if table["title"] == "What training drew from each source")
  assert [row[0] for row in shown["rows"]] == ["main", "sft", "last", "last"]

  # the record is enough to repeat it
  repeated = stages_of(repeat.get_config(str(once)), once)
  assert [stage.config.to_dict() for stage in repeated] == [
    stage.config.to_dict() for stage in stages_of(experiment.with_bos(config(), once), once)
  ]

  (alone,) = stages_of(repeat.get_config(str(once / "phases/last")), tmp_path)  # a phase, from the one before it
  assert alone.init == once / "phases/sft" and alone.config.data.mixture == config().phases.last.data.mixture

  # the order of the phases belongs to the record of the experiment
  other = config()
  other.phases.order = "last,sft"
  with pytest.raises(UserError, match="config.phases.order was 'sft,last' and is now 'last,sft'"):
    experiment.run(other, once, quiet())


def parameters_of(workdir):
  leaves, _ = open_model(workdir).leaves()
  return {path: whole(leaf, leaf.dtype) for path, leaf in leaves.items()}


def test_the_main_stage_has_one_name_in_progress_and_tables(tmp_path):
  config = tiny_relufy.get_config()
  assert [stage.title for stage in stages_of(config, Path("w"))] == ["base (swiglu)", "recovered (drelu)"]
  config.activation = "swiglu"
  assert stages_of(config, Path("w"))[-1].title == "trained (swiglu)"
  assert stages_of(tiny_drelu.get_config(), Path("w"))[0].title == "trained (drelu)"
  config.init = str(tmp_path / "absent")  # what `check` will say
  assert stages_of(config, Path("w"))[-1].title == "trained (swiglu)"
