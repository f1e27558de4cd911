"""Whole experiments, small, in this process: what they write, and what they refuse before touching anything."""

import json
import re
from pathlib import Path

import jax
import ml_collections
import pytest
from rich.console import Console

from configs import repeat, tiny_moe_drelu, tiny_relufy
from tsparse import experiment, files, sharding
from tsparse import workdir as workdirs
from tsparse.analysis import budget
from tsparse.check import check, check_step
from tsparse.convert.model import open_model
from tsparse.errors import RunFailure, UserError
from tsparse.train.loop import adapted, data_seed

WORDS = ["the cat", "a dog", "sat on", "ran to", "the mat", "his house", "and slept", "then ate"]


@pytest.fixture
def text(tmp_path):
  path = tmp_path / "text.jsonl"
  stories = [" ".join(WORDS[(i * k) % 8] for k in range(1, 9)) + f" {i}." for i in range(200)]
  path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
  return path


def small(text, module=tiny_relufy):
  config = module.get_config()
  config.model.update({"num_layers": 2, "d_model": 32, "d_ff": 64, "head_dim": 8})
  config.data.train = str(text)
  config.train.update({"steps": 12, "warmup_steps": 2, "seq_len": 32, "batch_size": 8, "checkpoint_every": 5})
  config.train.update({"log_every": 1, "eval_every": 6})
  config.analysis.update({"tokens": 500, "batch_size": 8, "levels": (0.0, 0.9)})
  if "base" in config:
    config.base.train.steps = 8
  return config


def quiet():
  return Console(quiet=True)


def test_relufication_writes_its_record_and_its_report(text, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  analysis = experiment.run(small(text), workdir, quiet())

  base, swapped, recovered = analysis["models"]
  assert [m["name"] for m in analysis["models"]] == ["base", "swapped", "recovered"]
  assert [m["bos"] for m in analysis["models"]] == [True] * 3 and open_model(workdir).bos == "on"  # of bytes
  assert (base["activation"], swapped["activation"], recovered["activation"]) == ("swiglu", "drelu", "drelu")
  assert base["zero_fraction"]["mean"] == 0 and swapped["zero_fraction"]["mean"] > 0.5
  assert recovered["loss"] < swapped["loss"]
  assert (base["trained_tokens"], recovered["trained_tokens"]) == (8 * 8 * 32, 20 * 8 * 32)
  assert recovered["parameters"]["activated"] < base["parameters"]["activated"] == base["parameters"]["total"]
  assert [point["sparsity"] for point in recovered["curve"]] == [0.0, 0.9] and not swapped["curve"]

  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [line for line in lines if "loss" in line]
  assert [line["step"] for line in losses] == list(range(1, 13))
  assert len(losses[0]["zero_fraction_per_layer"]) == 2 and losses[0]["zero_fraction"] > 0.5
  assert losses[-1]["tokens_seen"] == recovered["trained_tokens"]
  assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
  report = {path.name for path in (workdir / "report").iterdir()}
  assert report >= {"report.html", "analysis.json", "summary.json", "perplexity_vs_sparsity.png", "zeros_per_layer.png"}
  environment = json.loads((workdir / "environment.json").read_text())
  assert environment[0]["versions"]["jax"] == jax.__version__ and environment[0]["git"]
  assert list((workdir / "tensorboard").iterdir())

  # the same again, on a machine so slow that it would evaluate less, does nothing but read; another is kept out
  assert json.loads((workdir / "analysis_size.json").read_text()) == {"minutes": 10, "batches": [3], "evaluated": [3]}
  monkeypatch.setattr(budget, "measured", lambda *_: budget.Speed(0.0, 1e9))
  assert experiment.run(small(text), workdir, quiet()) == analysis
  assert open_model(workdir).row == 32  # what analyze.py takes, too
  other = small(text)
  other.train.steps = 13
  before = (workdir / "config.json").read_text()
  with pytest.raises(UserError, match="config.train.steps was 12 and is now 13"):
    experiment.run(other, workdir, quiet())
  assert (workdir / "config.json").read_text() == before

  # a recovery meets other batches than its base did
  assert data_seed(0, 0) != data_seed(0, base["trained_tokens"])

  # the workdir is an init for others; an init of another architecture or vocabulary is refused
  further = small(text)
  further.init = str(workdir / "base")
  further.activation = "fatrelu:0.01"
  check(further)
  further.model.d_ff = 128
  with pytest.raises(UserError, match="d_ff is 64 there and 128 here"):
    check(further)
  held = json.loads((workdir / "base" / "config.json").read_text())
  held["data"]["vocabulary"] = "other.model"
  (workdir / "base" / "config.json").write_text(json.dumps(held))
  further.model.d_ff = 64
  with pytest.raises(UserError, match="vocabulary 'other.model'"):
    check(further)


def test_a_moe_from_random_parameters_is_one_model_with_zeros_by_expert(text, tmp_path):
  (tmp_path / "other.txt").write_text(text.read_text())  # one document, of which nothing is held out
  config = small(text, tiny_moe_drelu)
  config.data.mixture, config.data.root = f"{text.name}:1,{tmp_path}/other.txt:3,stdlib_docs:2", str(tmp_path)
  analysis = experiment.run(config, tmp_path / "run", quiet())
  (model,) = analysis["models"]
  assert model["name"] == "trained" and [len(layer) for layer in model["zero_fraction"]["per_expert"]] == [4, 4]

  # of a mixture: what was drawn, and how good the model is on each source that holds out something
  assert [source["name"] for source in model["sources"]] == [text.name, "stdlib_docs"]
  assert analysis["leakage"]["main"]["shared"] == 0 < analysis["leakage"]["main"]["held_out"]
  assert [source["target"] for source in analysis["sources"]] == pytest.approx([1 / 6, 1 / 2, 1 / 3])
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  last = [line for line in lines if "loss" in line][-1]
  assert last["data/stdlib_docs/tokens"] == analysis["sources"][2]["tokens"] > 0 and last["data/fill"] == 1
  assert f"validation_loss/{text.name}" in lines[-1]
  page = (tmp_path / "run" / "report" / "report.html").read_text()
  assert "What training drew from each source" in page and "Held-out loss by source" in page


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(text, tmp_path):
  config = small(text, tiny_moe_drelu)
  config.train.update({"learning_rate": 1e30, "clip_norm": 1e30, "checkpoint_every": 1})
  with pytest.raises(RunFailure, match="not finite"):
    experiment.run(config, tmp_path / "run", quiet())
  steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
  assert max(steps) < 12


@pytest.mark.parametrize(
  ("field", "value", "sentence"),
  [
    ("activation", "dreul", "Did you mean 'drelu'"),
    ("train.steps", 0, "config.train.steps is 0"),
    ("train.seq_len", 513, "the model is made for at most 512"),
    ("train.keep_every", -1, "must not be negative"),
    ("train.z_loss", -1.0, "must not be negative"),
    ("train.router_jitter", -0.1, "must not be negative"),
    ("train.router_z_loss", 1e-3, "config.train.router_z_loss=0.001: the model has no experts"),
    ("train.learning_rate", float("inf"), "positive and finite"),
    ("train.final_learning_rate_fraction", 2.0, "would rise"),
    ("seed", 2**40, "below 2"),
    ("model.rope_theta", -1.0, "rope_theta"),
    ("base.train.steps", 0, "config.base: config.train.steps is 0"),
    ("train.b1", 1.0, "config.train.b1"),
    ("train.warmup_steps", -1, "warmup_steps is -1"),
    ("train.microbatches", 3, "multiple of config.train.microbatches"),
    ("train.batch_size", 12, "axis B has length 12"),
    ("analysis.levels", (0.5, 1.0), "0 <= level < 1"),
    ("analysis.levels", ("half",), "0 <= level < 1"),
    ("model.remat", "some", "choose one of none, dots, full"),
    ("model.vocab_size", 256, "has 259 ids"),
    ("model.attention_impl", "triton", "attention_impl triton is for GPUs"),
    ("model.attention_impl", "flash", "attention_impl 'flash' is unknown"),
    ("model.d_ff", 10**9, "does not fit"),
    ("mesh", {"data": 3, "fsdp": 1, "tensor": 1, "expert": 1}, "covers 3 devices"),
    ("init", "/nowhere", "holds no model"),
    ("data.train", "nothing.jsonl", "Cannot read"),
    ("data.train", "stdlb", "did you mean 'stdlib'"),
    ("data.train", "turbosparse_150b", "15 of 15 sources are missing"),
    ("data.mixture", "stdlib:1,gsm8k:-1", "has negative weights"),
    ("data.lanes", 0, "config.data.lanes is 0"),
    ("data.skip_bad", -1, "config.data.skip_bad is -1"),
    ("data.vocabulary", "no.model", "no.model"),
  ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(field, value, sentence, text, tmp_path):
  config = small(text)
  section, _, key = field.rpartition(".")
  (config[section] if section else config)[key] = value
  with pytest.raises(UserError, match=sentence):
    experiment.run(config, tmp_path / "run", quiet())
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (2, 3), (20, 2)])
def test_few_steps_and_small_batches_take_less_than_the_defaults_and_say_so(steps, rows, text):
  config = small(text)
  config.train.update({"steps": steps, "batch_size": rows, "warmup_steps": 50})
  config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1})
  one = sharding.make_mesh(config.mesh, jax.devices()[:1])
  check_step(config, one, "cpu")
  assert adapted(config) == (
    f"train.warmup_steps is {steps - 1}, as 50 do not fit in {steps} steps; "
    f"data.lanes is {rows}, as 8 do not divide a batch of {rows} rows"
  )
  assert (config.train.warmup_steps, config.data.lanes) == (50, 8)  # the record is what was asked for
  assert adapted(small(text)) == ""


def test_a_vocabulary_smaller_than_the_models_is_fine(text):
  config = small(text)
  config.model.vocab_size = 800
  check(config)


def test_a_workdir_has_one_writer_and_many_readers(text, tmp_path):
  config, writer = small(text, tiny_moe_drelu), tmp_path / "writer"
  config.data.bos = "on"  # as the run records it
  experiment.run(config, writer, quiet())
  unfinished = writer / "checkpoints" / "99.orbax-checkpoint-tmp"
  unfinished.mkdir()
  before = sorted(str(path) for path in (writer / "checkpoints").rglob("*"))
  reader = small(text, tiny_moe_drelu)
  reader.init = str(writer)
  with workdirs.claim(writer, config):
    with pytest.raises(UserError, match="in use by another process"):
      experiment.run(config, writer, quiet())
    experiment.run(reader, tmp_path / "reader", quiet())
  assert sorted(str(path) for path in (writer / "checkpoints").rglob("*")) == before


def test_an_init_without_a_checkpoint_is_refused_and_untouched(text, tmp_path):
  config = small(text)
  with workdirs.claim(tmp_path / "init", config):
    pass
  config.init = str(tmp_path / "init")
  before = sorted(path.name for path in (tmp_path / "init").iterdir())
  with pytest.raises(UserError, match="holds no checkpoint"):
    experiment.run(config, tmp_path / "run", quiet())
  assert sorted(path.name for path in (tmp_path / "init").iterdir()) == before and not (tmp_path / "run").exists()


def test_a_workdir_goes_on_when_configs_have_got_more_fields_since(text, tmp_path):
  """A field it lacks was at its default."""
  config, path = small(text, tiny_moe_drelu), tmp_path / "config.json"
  with workdirs.claim(tmp_path, config):
    fields = json.loads(path.read_text())
  del fields["train"]["z_loss"], fields["model"]["qk_norm"], fields["model"]["predictor_ranks"], fields["data"]["eos"]
  path.write_text(json.dumps(fields))
  workdirs.check_free(tmp_path, config)
  assert repeat.get_config(str(tmp_path)).to_dict() == config.to_dict()
  config.train.z_loss = 1e-4
  config.model.qk_norm = True
  sentence = "config.model.qk_norm was False and is now True, config.train.z_loss was 0.0 and is now 0.0001"
  with pytest.raises(UserError, match=sentence):
    workdirs.check_free(tmp_path, config)


def test_bos_is_what_the_workdir_records_or_as_the_start_or_the_tokenizer_has_it(text, tmp_path, monkeypatch):
  import tokenizers

  monkeypatch.setattr("tsparse.convert.model.checkpoint.latest_step", lambda _: 1)

  bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "the": 1}, unk_token="</s>"))
  bare.save(str(tmp_path / "tokenizer.json"))  # without BOS
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  config, path = small(text), tmp_path / "run" / "config.json"
  assert config.data.bos == "auto" and experiment.with_bos(config, tmp_path / "run").data.bos == "on"  # bytes
  config.data.vocabulary = str(tmp_path)
  resolved = experiment.with_bos(config, tmp_path / "run")
  assert resolved.data.bos == "off" and config.data.bos == "auto"
  with workdirs.claim(tmp_path / "run", resolved):
    fields = json.loads(path.read_text())
  assert open_model(path.parent).bos == "off"
  del fields["data"]["bos"]  # trained before there was a choice: with EOS in front, and it goes on so
  path.write_text(json.dumps(fields))
  resumed = experiment.with_bos(config, tmp_path / "run")
  workdirs.check_free(tmp_path / "run", resumed)
  assert resumed.data.bos == open_model(path.parent).bos == "on" == repeat.get_config(str(tmp_path / "run")).data.bos
  config.init = str(tmp_path / "run")
  assert experiment.with_bos(config, tmp_path / "new").data.bos == "on"
  config.data.bos = "off"
  assert experiment.with_bos(config, tmp_path / "run").data.bos == "off"
  with pytest.raises(UserError, match="config.data.bos was 'on' and is now 'off'"):
    workdirs.check_free(tmp_path / "run", experiment.with_bos(config, tmp_path / "run"))
  del fields["train"]  # a converted model, of which nothing is known
  path.write_text(json.dumps(fields))
  assert open_model(path.parent).bos == "auto"


@pytest.mark.parametrize(
  ("error", "sentence"),
  [
    (OSError(28, "No space left on device"), "(No space left on device) and is not there: make room"),
    (PermissionError(13, "Permission denied", "/a/b"), "(Permission denied: /a/b) and is not there: mend that"),
    (OSError("No space left on device (os error 28)"), "is not there: make room"),
  ],
)
def test_an_output_that_cannot_be_written_says_why(error, sentence, tmp_path):
  with pytest.raises(RunFailure, match=re.escape(sentence)), files.new_folder(tmp_path / "out"):
    raise error
  assert not list(tmp_path.iterdir())


def test_a_config_that_is_no_experiment_is_refused(tmp_path):
  with pytest.raises(UserError, match="the config has no name, seed"):
    experiment.run(ml_collections.ConfigDict({"lr": 1.0}), tmp_path / "run", quiet())


def test_a_malformed_line_is_named(text, tmp_path):
  with text.open("a") as file:
    file.write('{"text": "fine"}\n{"text": \n')
  with pytest.raises(UserError, match=r"text\.jsonl:202 is not JSON"):
    experiment.run(small(text), tmp_path / "run", quiet())


@pytest.mark.parametrize("workdir", ["/proc/here", "/dev/null/here"])
def test_a_workdir_that_cannot_be_written_is_refused(text, workdir):
  with pytest.raises(UserError, match="cannot be written"):
    experiment.run(small(text), Path(workdir), quiet())
