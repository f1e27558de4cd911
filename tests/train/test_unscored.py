"""Steps in which no token is scored: counted, left out of every mean, and no update."""

import json

import jax
import numpy as np
import optax
import pytest

from tests.recipes.test_training import one_device
from tests.recipes.test_training import small as with_recipe
from tests.train.test_alive import HELD_OUT, compile_once, go, small, text  # noqa: F401 fixtures
from tests.train.test_step import batch
from tsparse.data.iterator import TrainIterator
from tsparse.evaluate.perplexity import evaluate
from tsparse.train import failure
from tsparse.train.log import final_loss, trace
from tsparse.train.loop import compiled_step, initial_state, prepare

RECIPE = {"target": 0.9, "per_layer": True, "dead_after": 1, "revive_every": 1, "threshold": 0.01}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_such_a_step_changes_nothing_but_the_step_and_the_place_in_the_schedule(optimizer):
  config = with_recipe(sparsity=RECIPE, train={"optimizer": optimizer, "z_loss": 0.1}, hidden_thresholds=True)
  run = prepare(config, one_device())
  state, _ = initial_state(run, 0, None)
  step = compiled_step(run, config)
  seen = []
  for number in range(4):
    one = batch(number)
    one["loss_mask"] = one["segment_ids"] * (number != 2)
    before = jax.device_get(state)
    state, metrics = jax.device_get(step(state, one))
    seen.append(metrics)
    scheduled = [
      int(s.count)
      for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))
      if isinstance(s, optax.ScaleByScheduleState)
    ]
    assert scheduled and {*scheduled, int(state.step)} == {number + 1}  # so the logged rate is the one that was used
    with_schedule = lambda s: jax.tree.leaves(  # noqa: E731
      (s.params, s.opt_state, s.memory), is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState)
    )
    pairs = [p for p in zip(*map(with_schedule, (before, state)), strict=True) if isinstance(p[0], np.ndarray)]
    same = [np.array_equal(*pair) for pair in pairs]
    assert all(same) if number == 2 else not all(same)
  assert [m["scored_tokens"] for m in seen] == [104, 104, 0, 104]
  for name in ("loss", "z_loss", "sparsity_penalty"):
    assert [bool(np.isnan(m[name])) for m in seen] == [False, False, True, False]
  assert seen[2]["grad_norm"] == 0 and failure.is_finite(seen[2])
  assert not failure.is_finite(seen[2] | {"grad_norm": np.nan}) and not failure.is_finite(seen[1] | {"loss": np.nan})


def without_scores(monkeypatch, *numbers):
  """Batches of those numbers, from 1, have no scored token."""
  ask = TrainIterator.__next__

  def asked(self):
    self.asked = getattr(self, "asked", 0) + 1
    one = ask(self)
    return one | {"loss_mask": one["loss_mask"] * (self.asked not in numbers)}

  restore = TrainIterator.restore
  monkeypatch.setattr(TrainIterator, "__next__", asked)
  monkeypatch.setattr(TrainIterator, "restore", lambda self, state: (setattr(self, "asked", 6), restore(self, state)))


def test_such_steps_are_told_and_left_out_of_every_mean_also_after_a_resume(text, tmp_path, monkeypatch):  # noqa: F811
  without_scores(monkeypatch, 3, 5, 8)
  config = small(text, log_every=4)
  shown = go(config, tmp_path)
  assert shown.count("no token of step 3 is scored") == 1 and "step 5" not in shown
  assert "3 of 8 steps had no scored token" in shown
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  lines = {line["step"]: line for line in lines if "scored_tokens" in line}
  assert {step: line["scored_tokens"] for step, line in lines.items()} == {3: 0, 4: 128, 5: 0, 8: 0}
  assert [line["loss"] is None for line in lines.values()] == [True, False, True, True]
  assert final_loss(tmp_path, 8, share=0.9) == lines[4]["loss"] == trace(tmp_path)["loss"][0]
  assert final_loss(tmp_path, 8) is None and trace(tmp_path)["step"] == [4]

  (tmp_path / "checkpoints" / "8").rename(tmp_path / "8")
  shown = go(config, tmp_path)
  assert "resumed at step 6" in shown and "3 of 8 steps had no scored token" in shown
  again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert next(x for x in again if x["step"] == 8 and "loss" in x)["zero_fraction"] == lines[8]["zero_fraction"]


def test_an_evaluation_without_scored_tokens_has_no_loss(text):  # noqa: F811
  config, mesh = small(text), one_device()
  with jax.set_mesh(mesh):
    run = prepare(config, mesh)
    state, _ = initial_state(run, 0, None)
    found = evaluate(run.model, state.params, [HELD_OUT[0] | {"loss_mask": 0 * HELD_OUT[0]["inputs"]}], mesh)
  assert np.isnan(found.loss) and np.isnan(found.perplexity) and found.tokens == 0
