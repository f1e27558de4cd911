import json

import pytest

from tsparse.train.log import final_loss


def test_the_final_loss_is_the_mean_of_the_last_steps(tmp_path):
  assert final_loss(tmp_path, 100) is None
  lines = [{"step": step, "loss": step / 10} for step in range(1, 130)] + [{"step": 100, "validation_loss": 7.0}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 100, "lo')
  assert final_loss(tmp_path, 100) == pytest.approx(9.75)  # of steps 95 to 100
