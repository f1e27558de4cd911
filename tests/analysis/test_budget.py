"""How much of a text an analysis evaluates in the time that it has."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.analysis.test_masks import SIZES, held_out
from tests.test_analyze import TEXTS, analyze, save_bytes_model, save_texts
from tsparse.analysis import budget
from tsparse.analysis.run import Case
from tsparse.models.config import ModelConfig

CONFIG = ModelConfig(**SIZES)


def cases(batches=10):
  """Three of one text of which half the places are padding in the last row, the last case with twice the layers."""
  data = held_out(None)
  ids = [np.where(data.document_ids[0] >= 0, data.document_ids[0] + 4 * i, -1) for i in range(batches)]
  tokens = data.tokens // 2 * batches
  text = dataclasses.replace(data, batches=data.batches[:1] * batches, document_ids=ids, documents=40, tokens=tokens)
  of = lambda name, config, levels: Case(name, None, config, text, "text", levels, by_source={"text": text})  # noqa: E731
  deeper = dataclasses.replace(CONFIG, num_layers=6)
  return [of("base", CONFIG, (0.0, 0.5)), of("swapped", CONFIG, ()), of("deep", deeper, (0.0, 0.5))]


def test_the_estimate_is_of_what_is_done():
  """A mask of a model with F 8 costs little more than a pass; level 0 is the pass of the model as it is."""
  one, two, deep = cases()
  assert budget.forwards(two) == 10 and 20 < budget.forwards(one) < 28
  grows, rest = budget.seconds([one, two], budget.Speed(100.0, 2.0))
  assert (grows, rest) == (2 * (budget.forwards(one) + 10), 0)
  assert (
    1.2 < budget.seconds([two, deep], budget.Speed(0, 1))[0] / budget.seconds([two, one], budget.Speed(0, 1))[0] < 2
  )
  thresholds = dataclasses.replace(one, parts=("counts", "thresholds"), calibration=one.data)
  assert budget.seconds([thresholds], budget.Speed(0, 1.0))[1] > 60  # 10 batches, however little is evaluated


def test_texts_are_cut_alike_and_the_record_is_kept_to_by_other_machines(tmp_path):
  record, speed = tmp_path / "size.json", budget.Speed(50.0, 6.0)
  whole = sum(budget.seconds(cases(), speed)) / 60
  every, said = budget.fitted(cases(), speed, 1.01 * whole, record)
  assert said is None and [len(case.data.batches) for case in every] == [10] * 3
  assert budget.fitted(cases(), speed, 0.0)[1] is None  # no limit

  some, said = budget.fitted(cases(), speed, 0.45 * whole, record)
  assert {len(case.data.batches) for case in some} == {4} and len({id(case.data) for case in some}) == 1
  assert all(case.by_source["text"] is case.data for case in some)
  text = some[0].data
  assert text.tokens == sum((b["segment_ids"] > 0).sum() for b in text.batches) and text.documents == 16
  assert not text.complete and len(text.document_ids) == 4
  assert (said["tokens"], said["of"], said["batches"], said["of_batches"]) == (
    text.tokens,
    10 * text.tokens // 4,
    4,
    10,
  )
  assert f"the first {text.tokens} of {said['of']} tokens are evaluated, which fill 4 of 10 batches" in said["why"]
  fast = budget.Speed(0.0, 1e-6)
  assert budget.fitted(cases(), fast, 0.45 * whole, record)[1] == said  # by the record
  assert budget.fitted(cases(), fast, 0.5 * whole, record)[1] is None  # other minutes: decided anew
  assert budget.fitted(cases(12), speed, 0.5 * whole, record)[1]["batches"] == 5  # another text
  assert json.loads(record.read_text()) == {"minutes": 0.5 * whole, "batches": [12], "evaluated": [5]}


def test_at_least_a_batch_with_a_scored_token_is_evaluated():
  (case, *_) = cases(3)
  masked = [dict(batch, loss_mask=np.full_like(batch["inputs"], i == 1)) for i, batch in enumerate(case.data.batches)]
  case = dataclasses.replace(case, data=dataclasses.replace(case.data, batches=masked), by_source={})
  (cut,), said = budget.fitted([case], budget.Speed(0, 1e6), 1e-3)
  assert len(cut.data.batches) == 2 and said["batches"] == 2


def test_an_analysis_says_how_much_it_evaluated_and_why(tmp_path, monkeypatch):
  save_bytes_model(tmp_path / "model")
  text = save_texts(tmp_path / "text.jsonl", TEXTS)
  monkeypatch.setattr(budget, "measured", lambda *_: budget.Speed(1.0, 25.0))
  console = Console(record=True, width=400, file=io.StringIO())
  made = analyze([tmp_path / "model"], text, tmp_path / "out", minutes=1.0, batch_size=8, console=console)
  limited, (model,) = made["budget"], made["models"]
  assert limited["batches"] == 2 < limited["of_batches"] and model["tokens"] == limited["tokens"] < limited["of"]
  assert len(model["per_document"]["tokens"]) == model["documents"] < 40
  printed = console.export_text()
  assert limited["why"] in printed and f"1.0 forward passes over {limited['tokens']} tokens, about 50 s" in printed
  made = analyze([tmp_path / "model"], text, tmp_path / "less", minutes=0.1, batch_size=8, console=console)
  assert made["budget"]["batches"] == 1
  assert "more than the limit of 0.1 minutes, as at least one batch is evaluated" in console.export_text()
  assert limited["why"] in json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
  assert limited["why"].split(":")[0] in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (80, "80 s"), (372, "6.2 min"), (9000, "2.5 h")])
def test_durations_are_read_at_a_glance(seconds, text):
  assert budget.duration(seconds) == text
