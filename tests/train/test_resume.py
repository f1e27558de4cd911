"""Which checkpoint training goes on from: damage moves one aside, nothing else does."""

import errno
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tsparse import experiment
from tsparse.errors import RunFailure, UserError
from tsparse.train import checkpoint, damage, resume
from tsparse.train.step import TrainState


def state_of(step, width=16):
  weights = jnp.asarray(np.random.default_rng(step).normal(size=(64, width)), jnp.float32)
  params = {"a": weights, "b": {"c": jnp.arange(1000.0) * step}}
  return TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state={"mu": params})


def target_of(state):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return checkpoint.abstract(jax.eval_shape(lambda: state), jax.tree.map(lambda _: sharding, state))


def equal(found, step):
  return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found, state_of(step))))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  """Checkpoints of steps 6 and 8."""
  monkeypatch.setattr(damage, "PAUSE", 0.0)
  with checkpoint.manager(tmp_path, keep=2) as checkpoints:
    for step in (6, 8):
      checkpoint.save(checkpoints, state_of(step), b"position", 5 * step)
  return tmp_path


def resumed(workdir, warn=pytest.fail, width=16):
  return resume.restore_newest(workdir, target_of(state_of(8, width)), warn)


def failing(monkeypatch, error, times):
  """Makes Orbax raise `error` at its first `times` restores."""
  restore, left = checkpoint.ocp.CheckpointManager.restore, iter(range(times))

  def sometimes(*arguments, **options):
    if next(left, None) is not None:
      raise error
    return restore(*arguments, **options)

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", sometimes)


def wrapped(cause):
  """As Orbax wraps whatever reading an array raises."""
  error = Exception("Encountered error while reading array index: ().")
  error.__cause__ = cause
  return error


PASSING = [
  (MemoryError(), RunFailure, "could not be read, twice .MemoryError"),
  (wrapped(MemoryError()), RunFailure, "could not be read, twice .MemoryError"),
  (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), RunFailure, "Out of memory"),
  (OSError(errno.EIO, "Input/output error"), RunFailure, "Input/output error"),
  (OSError(errno.EMFILE, "Too many open files"), RunFailure, "Too many open files"),
  (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), RunFailure, "Connection timed out"),
  (ValueError("RESOURCE_EXHAUSTED: Error reading x: Too many open files [os_error_code='24']"), RunFailure, "Too many"),
  (PermissionError(errno.EACCES, "Permission denied"), UserError, "Permission denied.*: make it readable"),
]


@pytest.mark.parametrize(("error", "kind", "sentence"), PASSING, ids=lambda x: str(x)[:20])
def test_an_error_that_is_not_damage_is_tried_again_and_then_raised_and_nothing_moves(
  error, kind, sentence, workdir, monkeypatch
):
  with monkeypatch.context() as patch:
    failing(patch, error, 1)
    assert equal(resumed(workdir).state, 8)
  before = sorted(workdir.rglob("*"))
  for read in (
    lambda: resumed(workdir),
    lambda: checkpoint.data_position(workdir),
    lambda: checkpoint.restore_parameters(workdir, 8, target_of(state_of(8)).params),
  ):
    with monkeypatch.context() as patch, pytest.raises(kind, match=f"step 8 of {workdir} .*{sentence}") as raised:
      failing(patch, error, 2)
      read()
    assert "torn" not in str(raised.value)
  assert sorted(workdir.rglob("*")) == before


def test_a_start_is_not_of_an_older_checkpoint_because_memory_was_short(workdir, tmp_path_factory, monkeypatch):
  run = tmp_path_factory.mktemp("run")
  restore = checkpoint.restore_parameters
  target = target_of(state_of(8)).params
  monkeypatch.setattr(
    experiment, "open_model", lambda path, step: type("M", (), {"restore": lambda _, t: restore(path, step, t)})()
  )
  with monkeypatch.context() as patch, pytest.raises(RunFailure, match="step 8 .*MemoryError"):
    failing(patch, MemoryError(), 2)
    experiment.restore_init(workdir, run, Console(file=io.StringIO()), target)
  assert not (run / "init.json").exists()
  assert experiment.restore_init(workdir, run, Console(file=io.StringIO()), target)[1] == 40


def test_a_checkpoint_of_another_model_is_not_damaged(workdir):
  with pytest.raises(UserError, match="step 8 of .* holds other arrays than this model has .Requested shape: .64, 17"):
    resumed(workdir, width=17)
  target = target_of(state_of(8))
  other = target.replace(params={"a": target.params["a"]})
  with pytest.raises(UserError, match="step 8 of .* holds other arrays than this model has"):
    resume.restore_newest(workdir, other, pytest.fail)
  assert not (workdir / "torn").exists()


DAMAGE = [ValueError("DATA_LOSS: CRC-32C"), wrapped(ValueError("OUT_OF_RANGE: x")), KeyError("x"), FileNotFoundError()]


@pytest.mark.parametrize("error", DAMAGE, ids=lambda x: type(x).__name__)
def test_damage_moves_a_checkpoint_aside(error, workdir, monkeypatch):
  failing(monkeypatch, error, 1)
  warnings = []
  assert equal(resumed(workdir, warnings.append).state, 6)
  assert len(warnings) == 1 and (workdir / "torn" / "8").is_dir()


def test_what_one_host_finds_all_go_by(workdir, monkeypatch):
  """Damage counts on whichever host it is, and so does an error that passes; this host has neither."""
  votes = iter([True])
  with monkeypatch.context() as patch:
    patch.setattr(damage.hosts, "any_host", lambda flag: next(votes, flag))
    warnings = []
    assert equal(resumed(workdir, warnings.append).state, 6)
  assert "another host" in warnings[0]
  votes = iter([False, True] * 2)
  monkeypatch.setattr(damage.hosts, "any_host", lambda flag: next(votes, flag))
  with pytest.raises(RunFailure, match="step 6 .* could not be read, twice .RuntimeError: another host"):
    resumed(workdir)


def test_a_damaged_note_of_the_newest_checkpoint_is_a_sentence(workdir):
  (workdir / "newest.json").write_text('{"step": ')
  with pytest.raises(UserError, match="newest.json is damaged .*: take it away"):
    resumed(workdir)
