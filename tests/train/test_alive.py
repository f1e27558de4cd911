"""Training that is stopped, whose checkpoints are torn, whose disk is full, whose loss is not finite."""

import io
import json
import os
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from configs import default
from tsparse import experiment, sharding
from tsparse import workdir as workdirs
from tsparse.convert.model import open_model
from tsparse.data.iterator import TrainIterator
from tsparse.errors import RunFailure, Stopped, UserError
from tsparse.train import checkpoint, resume
from tsparse.train.clock import KNOWN, Clock
from tsparse.train.log import MetricWriter
from tsparse.train.loop import prepare, train


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
  """Every run here compiles the same step: one is enough."""
  options = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
  options |= {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": 0}
  before = {name: getattr(jax.config, name) for name in options}
  for settings in (options, before):
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if settings is options:
      yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.jsonl"
  path.write_text("".join(json.dumps({"text": f"{i} is followed by {i + 1}."}) + "\n" for i in range(400)))
  return path


def small(text, **settings):
  config = default.get_config()
  config.activation = "drelu"
  config.model.update({"num_layers": 1, "d_model": 16, "d_ff": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8})
  config.data.train = str(text)
  config.train.update({"steps": 8, "warmup_steps": 2, "seq_len": 16, "batch_size": 8, "checkpoint_every": 3})
  config.train.update({"log_every": 1, "eval_every": 100, "eval_batches": 1, **settings})
  return config


ROW = np.ones([8, 16], np.int32)
HELD_OUT = [{"inputs": ROW, "targets": ROW, "segment_ids": ROW, "positions": np.cumsum(ROW, axis=1) - 1}]


def go(config, workdir, devices=1, **sizes):
  """Trains in `workdir`; returns what was shown."""
  shown = io.StringIO()
  console = Console(file=shown, width=10_000)
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | sizes, jax.devices()[:devices])
  try:
    with jax.set_mesh(mesh), workdirs.claim(workdir, config):
      train(config, workdir, mesh, HELD_OUT, console, "training")
  finally:
    workdir.joinpath("shown").write_text(shown.getvalue())
  return shown.getvalue()


def losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
  """A run of 8 steps that nothing befell; its checkpoints are of steps 6 and 8."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  go(small(text), workdir)
  assert steps(workdir) == [6, 8] and list(losses(workdir)) == list(range(1, 9))
  return workdir


def at_batch(monkeypatch, number, act):
  """Calls `act` when the batch of that number is asked for."""
  ask, count = TrainIterator.__next__, iter(range(1, 10**6))

  def asked(self):
    if next(count) == number:
      act()
    return ask(self)

  monkeypatch.setattr(TrainIterator, "__next__", asked)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bit_for_bit(
  number, code, text, whole, tmp_path, monkeypatch
):
  before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
  seen = []

  def act():
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    seen.extend(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT))

  at_batch(monkeypatch, 5, act)
  with pytest.raises(Stopped, match=f"{number.name}; the checkpoint of step 5 of 8 is saved") as stop:
    go(small(text), tmp_path)
  assert stop.value.exit_code == code and steps(tmp_path) == [3, 5] and list(losses(tmp_path)) == [1, 2, 3, 4, 5]
  assert seen == [signal.SIG_DFL] * 2  # the next signal ends the process at once
  assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
  monkeypatch.undo()
  assert "resumed at step 5 of 8" in go(small(text), tmp_path)
  assert losses(tmp_path) == losses(whole)


def tear(path):
  if path.is_file():
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  else:
    shutil.rmtree(path)


def test_a_torn_checkpoint_is_set_aside_for_the_one_before_and_its_step_is_saved_again(text, whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / "run")
  tear(workdir / "checkpoints" / "8" / "params")
  shown = go(small(text), workdir)
  assert f"the checkpoint of step 8 of {workdir} is torn" in shown and "going on from that of step 6 instead" in shown
  assert f"What is left of it is in {workdir}/torn/8." in shown and "resumed at step 6 of 8" in shown
  assert (workdir / "torn" / "8" / "optimizer").is_dir()
  assert losses(workdir) == losses(whole) and steps(workdir) == [6, 8]

  shutil.rmtree(workdir / "checkpoints" / "8")
  shown = go(small(text), workdir)
  gone = f"the checkpoint of step 8 of {workdir} is gone; going on from that of step 6 instead"
  assert gone in shown

  # nor does a host overlook it where the first one has noted step 6 by the time they met: they would part there
  shutil.rmtree(workdir / "checkpoints" / "8")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(resume.hosts, "any_host", lambda flag: (resume.record(workdir, 6), flag)[1])
    assert gone in go(small(text), workdir)
  assert losses(workdir) == losses(whole) and "warning" not in go(small(text), workdir)

  for step in steps(workdir):
    tear(workdir / "checkpoints" / str(step) / "data")
  with pytest.raises(UserError, match="no checkpoint of .* can be restored .step 8: .*; step 6: "):
    go(small(text), workdir)
  assert steps(workdir) == [6, 8]
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(UserError, match="had a checkpoint of step 8 and has none any more"):
    go(small(text), workdir)


def test_whatever_file_is_cut_or_lost_the_checkpoint_before_is_restored_or_nothing_was_lost(text, whole, tmp_path):
  """Each file of a checkpoint in turn; a file that nobody needs may go, a number may not change."""
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
  target = prepare(small(text), mesh).target
  good = resume.restore_newest(whole, target, pytest.fail)
  last = whole / "checkpoints" / "8"
  files = [path.relative_to(whole) for path in sorted(last.rglob("*")) if path.is_file()]
  fell_back = []
  for file in files:
    for harm in (tear, os.remove):
      workdir = shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
      harm(workdir / file)
      warnings = []
      found = resume.restore_newest(workdir, target, warnings.append)
      if found.step == 8:
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), found.state, good.state)
        assert all(jax.tree.leaves(same)) and found.position == good.position, (file, harm)
      else:
        assert found.step == 6 and len(warnings) == 1 and "step 8" in warnings[0] and "step 6" in warnings[0]
        fell_back.append(file.parts[2])
      shutil.rmtree(workdir)
  assert {"params", "optimizer", "data"} <= set(fell_back)


def test_an_init_whose_newest_checkpoint_is_torn_gives_the_one_before(text, whole, tmp_path):
  init, run = shutil.copytree(whole, tmp_path / "init"), tmp_path / "run"
  run.mkdir()
  tear(init / "checkpoints" / "8" / "params")
  before = sorted(init.rglob("*"))
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
  target = prepare(small(text), mesh).target.params
  shown = io.StringIO()
  for _ in range(2):  # the second start takes what the first has noted
    params, tokens = experiment.restore_init(init, run, Console(file=shown, width=10_000), target)
    good = checkpoint.restore_parameters(whole, 6, target)[0]
    jax.tree.map(np.testing.assert_array_equal, params, good)
  assert tokens == 6 * 8 * 16 and json.loads((run / "init.json").read_text())["step"] == 6
  assert shown.getvalue().count("\n") == 1 and sorted(init.rglob("*")) == before
  assert f"the checkpoint of step 8 of {init} is torn" in shown.getvalue()
  assert shown.getvalue().endswith("; starting from step 6 instead.\n")

  tear(init / "checkpoints" / "6" / "params")
  with pytest.raises(UserError, match="the checkpoint of step 6 of .* is torn"):
    experiment.restore_init(init, run, Console(quiet=True), target)
  (run / "init.json").unlink()
  with pytest.raises(UserError, match="no checkpoint of config.init .* can be restored .step 8: .*; step 6: "):
    experiment.restore_init(init, run, Console(quiet=True), target)


def test_a_failed_save_is_told_and_training_goes_on(text, whole, tmp_path, monkeypatch):
  save, failing = checkpoint.save, {3, 6}

  def sometimes(checkpoints, state, *arguments):
    if int(state.step) in failing:
      raise OSError(28, "No space left on device")
    save(checkpoints, state, *arguments)

  monkeypatch.setattr(checkpoint, "save", sometimes)
  shown = go(small(text), tmp_path)
  for step in failing:
    assert f"the checkpoint of step {step} could not be saved in {tmp_path} (No space left on device)" in shown
  assert losses(tmp_path) == losses(whole) and steps(tmp_path) == [8]

  failing = {8}
  with pytest.raises(RunFailure, match="step 8 could not be saved .* It was the last"):
    go(small(text), tmp_path / "last")
  assert steps(tmp_path / "last") == [3, 6]
  failing = set()
  go(small(text), tmp_path / "last")
  assert steps(tmp_path / "last") == [6, 8] and losses(tmp_path / "last") == losses(whole)


def test_a_save_that_fails_in_the_background_is_told_too(text, whole, tmp_path):
  """A file that stands where Orbax wants a folder: it fails in Orbax's own thread, or in the call, as it likes."""
  (tmp_path / "checkpoints").write_text("in the way")
  with pytest.raises(RunFailure, match="step 8 could not be saved"):
    go(small(text), tmp_path)
  shown = (tmp_path / "shown").read_text()
  assert [f"step {step} could not be saved" in shown for step in (3, 6, 8)] == [True] * 3
  assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("limit", [16_000, 500])  # of a file's bytes: too few for arrays, too few for anything
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint_and_one_sentence(limit, text, whole, tmp_path, capfd):
  """The system refuses to write in Orbax's own threads, from the third step to the fifth."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  jax.config.update("jax_enable_compilation_cache", False)  # whose files are refused too
  try:
    with pytest.MonkeyPatch.context() as patch:
      at_batch(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
      at_batch(patch, 5, lambda: (time.sleep(1), resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))))
      shown = go(small(text), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    jax.config.update("jax_enable_compilation_cache", True)
  told = [line for line in shown.splitlines() if "could not be saved" in line]
  assert told == [
    f"warning: the checkpoint of step 3 could not be saved in {tmp_path} (File too large). Training goes on, and saves "
    "again at the next."
  ]
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]
  assert losses(tmp_path) == losses(whole) and "Traceback" not in capfd.readouterr().err


def test_a_loss_that_is_not_finite_leaves_what_is_needed_to_look_at_it(text, tmp_path):
  config = small(text, learning_rate=1e30, clip_norm=1e30)
  with pytest.raises(RunFailure, match="are not finite; .*failure is a workdir with the parameters") as failure:
    go(config, tmp_path)
  folder = tmp_path / "failure"
  metrics = json.loads((folder / "metrics.json").read_text())
  step = metrics["step"]
  assert f"at step {step} are" in str(failure.value) and metrics["repeated"] is True
  assert {metrics["loss"], metrics["grad_norm"]} & {"nan", "inf"}
  assert list(losses(tmp_path)) == list(range(1, step)) and not list(tmp_path.glob(".failure*"))
  model = open_model(folder)
  batch = np.load(folder / "batch.npz")
  assert model.step == step - 1 and batch["targets"].shape == (8, 16)

  # the state, the batch and the position in the data are those of that step: it fails again at once
  shutil.copytree(folder / "checkpoints", tmp_path / "again" / "checkpoints")
  with pytest.raises(RunFailure, match=f"at step {step} are not finite"):
    go(config, tmp_path / "again")
  for name, x in np.load(tmp_path / "again" / "failure" / "batch.npz").items():
    np.testing.assert_array_equal(x, batch[name])


def test_a_slow_step_is_told(text, tmp_path, monkeypatch):
  at_batch(monkeypatch, KNOWN + 4, lambda: time.sleep(3))
  shown = go(small(text, steps=KNOWN + 6, checkpoint_every=100), tmp_path)
  lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
  slow = [line for line in lines if "slow_step_seconds" in line]
  assert any(line["slow_step_seconds"] > 2.9 and f"step {line['step']} took" in shown for line in slow)


def test_the_clock_leaves_out_what_is_not_a_step(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  clock, found = Clock(), []
  for step, seconds in enumerate([100.0, *[1.0] * KNOWN, 9.9, 10.1, 1.0]):
    now[0] += seconds
    found.append((step, clock.tick(1.0)[1]))
    now[0] += 50.0  # an evaluation
    clock.restart()
  slow = [(step, found) for step, found in found if found]
  assert slow == [(KNOWN + 2, (pytest.approx(10.1), pytest.approx(1.0)))]


def test_time_spent_on_data_counts_unless_a_step_outlasts_it(monkeypatch):
  class Result:
    def __init__(self, ready):
      self.is_ready = lambda: ready

  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  clock = Clock()
  for running, seconds in ((None, 1.0), (Result(True), 2.0), (Result(False), 4.0)):
    with clock.waiting(running):
      now[0] += seconds
  now[0] += 3.0
  assert clock.waited_fraction() == 0.3
  now[0] += 1.0
  assert clock.waited_fraction() == 0.0


def test_a_run_that_waits_for_its_data_says_so(text, tmp_path, monkeypatch):
  ask = TrainIterator.__next__
  monkeypatch.setattr(TrainIterator, "__next__", lambda self: (time.sleep(0.5), ask(self))[1])
  go(small(text, steps=6, checkpoint_every=100), tmp_path)
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  assert max(line.get("data_wait_fraction", 0) for line in lines) > 0.5


def test_metrics_wait_for_a_disk_that_is_full(tmp_path, monkeypatch):
  warnings = []
  writer = MetricWriter(tmp_path, 0, warnings.append)
  writer.write(1, {"loss": 1.0})
  (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  for step in (2, 3):
    writer.write(step, {"loss": 1.0})
  (tmp_path / "metrics.jsonl").unlink()
  (tmp_path / "kept").rename(tmp_path / "metrics.jsonl")
  writer.write(4, {"loss": 1.0})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
  assert len(warnings) == 1 and "step 2 could not be written (No space left on device)" in warnings[0]


def test_a_checkpoint_goes_on_over_other_devices(text, whole, tmp_path):
  """8 devices to step 3, 2 x 4 to step 6, 1 to the end: the same batches, and the losses of one device all along."""
  for devices, sizes, last in ((8, {"data": 8}, 3), (8, {"data": 2, "fsdp": 4}, 6), (1, {}, 8)):
    config = small(text)
    if last < 8:
      with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match=f"step {last} of 8"):
          go(config, tmp_path, devices, **sizes)
    else:
      go(config, tmp_path, devices, **sizes)
  ours, theirs = losses(tmp_path), losses(whole)
  assert list(ours) == list(theirs)
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_checkpoints_at_multiples_of_keep_every_stay_for_good_after_a_resume_too(text, whole, tmp_path):
  """keep_every is no multiple of checkpoint_every: what is to be kept is saved all the same."""
  config = small(text, keep_checkpoints=1, keep_every=2)
  go(config, tmp_path)
  assert steps(tmp_path) == [2, 4, 6, 8] and losses(tmp_path) == losses(whole)
  for step in (6, 8):
    shutil.rmtree(tmp_path / "checkpoints" / str(step))
  assert "resumed at step 4 of 8" in go(config, tmp_path)
  assert steps(tmp_path) == [2, 4, 6, 8] and losses(tmp_path) == losses(whole)
