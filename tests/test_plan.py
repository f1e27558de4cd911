"""experiments/plan.py: what it writes, and what it answers to bad input."""

import importlib.util
import json

import pytest

from configs import mistral_drelu
from tests import commands
from tsparse.errors import UserError
from tsparse.plan import run
from tsparse.train.topology import parse

SMALL = [
  "--config.model.num_layers=2",
  "--config.model.d_model=32",
  "--config.model.d_ff=64",
  "--config.train.seq_len=32",
]


def plan(*arguments):
  return commands.run("experiments/plan.py", *arguments)


def test_a_step_is_compiled_for_virtual_devices(tmp_path):
  done = plan(
    "--config=configs/tiny_drelu.py", "--topology=cpu:8", *SMALL, f"--out={tmp_path}/plan.json", "--zero_fraction=1"
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "plan.json").read_text())
  assert result["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "expert": 1} and result["source"] == "compiler"
  memory = result["memory"]
  exact = memory["estimate"]["parameters"] + memory["estimate"]["optimizer"]
  batch = 5 * 2 * 32 * 4  # inputs, targets, segment_ids, positions, loss_mask of 2 rows
  assert memory["compiler"]["arguments"] == exact + batch + 4  # and the step
  assert result["collectives"]["all-gather"]["bytes"] > 0 and memory["compiler"]["temporaries"] > 0
  assert result["flops"]["sparse"] == result["flops"]["model"] - 3 * 512 * 2 * 2 * 3 * 32 * 64
  assert result["tokens_per_step"] == 512 and result["fits"] is None
  assert "all-gather per step and chip" in done.stdout


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--topology=v9:4x4"], "--topology=v9:4x4 is unknown: choose one like v5e:16x16, v5p:4x4x8"),
    (["--topology=v5p:4x4"], "--topology=v5p:4x4 is unknown"),
    (["--topology=cpu:8", "--config.mesh.fsdp=3"], "fsdp=3, tensor=1, expert=1) covers 3 devices and there are 8"),
    (
      ["--topology=cpu:8", "--config.model.num_experts=4", "--config.model.experts_per_token=2",
       "--config.mesh.expert=8"],
      "config.mesh.expert is 8 and the model has 4 experts",
    ),
    (["--topology=cpu:8", "--config.mesh.tensor=8"], "axis N has length 4, which does not divide over"),
    (["--topology=cpu:8", "--config.train.microbatches=4"], "axis B has length 4, which does not divide"),
    (["--topology=cpu:8", "--zero_fraction=2"], "--zero_fraction=2.0: it is a share"),
    (["--topology=cpu:8", "--config.model.num_experts=8", "--config.model.experts_per_token=2",
      "--config.model.moe_impl=ep_ragged_a2a"], "runs on TPUs only and this is a cpu"),
    ([], "--config and --topology are needed"),
  ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path):
  done = plan("--config=configs/tiny_drelu.py", *arguments, f"--out={tmp_path}/plan.json")
  assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
  assert not (tmp_path / "plan.json").exists()


def test_without_libtpu_memory_is_estimated_and_that_is_said(tmp_path, monkeypatch):
  """Virtual CPU devices stand in for the chips, 8 of them here: what is estimated is what one of them holds."""
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name))
  for microbatches, fits in ((16, True), (1, False)):
    config = mistral_drelu.get_config()
    config.train.microbatches = microbatches
    out = tmp_path / f"{microbatches}.json"
    run(config, "v5p:2x2x2", 0.9, out)
    result = json.loads(out.read_text())
    assert result["fits"] is fits and "libtpu is not installed" in result["source"] and "roofline" not in result
    assert result["memory"]["estimate"]["parameters"] == pytest.approx(4 * 7_241_732_096 / 8, rel=1e-3)


def test_a_slice_that_cannot_hold_the_state_needs_more_chips_and_not_smaller_microbatches(tmp_path):
  arguments = ["--config=configs/mistral_drelu.py", "--topology=v5e:2x2", "--nocompile", f"--out={tmp_path}/plan.json"]
  told = [" ".join(plan(*arguments, f"--config.mesh.data={data}").stdout.split()) for data in (1, 4)]
  assert "are estimated; take a larger slice" in told[0]
  assert "are estimated; set --config.mesh.data=1 --config.mesh.fsdp=-1, or take a larger slice" in told[1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: requirements-tpu.txt")
def test_libtpu_compiles_for_chips_that_are_not_there(tmp_path):
  arguments = ["--config=configs/tiny_drelu.py", *SMALL, f"--out={tmp_path}/plan.json"]
  done = plan(*arguments, "--topology=v5e:2x2")
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "plan.json").read_text())
  assert result["fits"] is True and result["source"] == "compiler" and result["days"] > 0
  huge = ["--config.model.d_model=8192", "--config.model.d_ff=65536", "--config.train.batch_size=512"]
  done = plan(*arguments, "--topology=v5e:2x2", *huge)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False and "the compiler says" in done.stdout


def test_topologies_are_parsed():
  assert parse("v5p:4x4x8") == ("v5p", (4, 4, 8)) and parse("cpu:8") == ("cpu", (8,))
  for name in ("v5e", "v5e:0x4", "v5e:4x4x4", "cpu:2x2", "v5p:axb", ""):
    with pytest.raises(UserError, match="unknown: choose one like"):
      parse(name)
