"""How long an analysis will take, and how much of the text it evaluates so that it takes no longer than it may."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tsparse import files, hosts
from tsparse.analysis.cost import pieces
from tsparse.data import EvaluationSet
from tsparse.evaluate import perplexity
from tsparse.models.flops import forward_flops
from tsparse.models.loss import scored
from tsparse.sharding import place


class Speed(NamedTuple):
  """Seconds of the plain forward pass over a batch of the first case: of compiling it, and of a run."""

  compiling: float
  running: float


def measured(model: Any, params: Any, batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> Speed:
  """The speed of one batch. The evaluation finds the program that is compiled here in JAX's cache."""
  placed, start = place(batch, mesh), time.monotonic()
  program = perplexity.compiled.lower(model, params, placed, None).compile()
  between = time.monotonic()
  jax.block_until_ready(program(params, placed, None))
  return Speed(between - start, time.monotonic() - between)


def costs(case: Any) -> dict[str, Any]:
  """`cost.pieces` of a Case."""
  seq_len = case.data.batches[0]["targets"].shape[1]
  return pieces(case.config, seq_len, case.levels, case.selections, case.parts)


def forwards(case: Any) -> float:
  """Plain forward passes over a batch that a Case takes, those of its sources included."""
  calibration = len((case.calibration or case.data).batches)
  found = sum(cost.batches(len(case.data.batches), calibration) for cost in costs(case).values())
  return found + sum(len(each.batches) for each in case.by_source.values() if each is not case.data)


def seconds(cases: Sequence[Any], speed: Speed) -> tuple[float, float]:
  """Estimated seconds of the cases: what grows with the evaluated text, and the rest, calibration among it."""
  grows = rest = 0.0
  unit = sum(forward_flops(cases[0].config, cases[0].data.batches[0]["targets"].shape[1]).values())
  for case in cases:
    shape = case.data.batches[0]["targets"].shape
    weight = sum(forward_flops(case.config, shape[1]).values()) / unit * math.prod(shape)
    weight /= math.prod(cases[0].data.batches[0]["targets"].shape)
    calibration = 0 if case.calibration is None else len(case.calibration.batches)  # that of the evaluated text grows
    fixed = sum(cost.batches(0, calibration) for cost in costs(case).values())
    grows += (forwards(case) - fixed) * weight * speed.running
    rest += fixed * weight * speed.running
  return grows, rest


def fitted(
  cases: Sequence[Any], speed: Speed, minutes: float, record: Path | None = None
) -> tuple[list[Any], dict[str, Any] | None]:
  """The cases with as much of their texts as `minutes` allow: whole batches, the first ones, at least one of each.

  The same share of every text. It depends on how fast the machine is, so it is decided once, on the first host, and
  written to `record`; a record of the same texts and minutes is kept to.

  Args:
    cases: of analysis/run.py; those of one text share one EvaluationSet.
    speed: of the first of them.
    minutes: that their forward passes may take; 0 for any number.
    record: a JSON file.

  Returns:
    The cases, and what analysis.json says in "budget" if some of the text is left out: "minutes", "tokens" kept, "of"
    tokens, "batches" and "of_batches" (of the texts that are analysed, without those of single sources), "why".
  """
  texts = {id(text): text for case in cases for text in (case.data, *case.by_source.values())}
  whole = [len(text.batches) for text in texts.values()]

  def decide() -> list[int]:
    if record is not None and record.exists():
      known = json.loads(record.read_text())
      if (known["minutes"], known["batches"]) == (minutes, whole):
        return known["evaluated"]
    grows, rest = seconds(cases, speed)
    share = 1.0 if not minutes else min(1.0, max(0.0, (60 * minutes - rest) / grows))
    kept = [max(1, int(share * n)) for n in whole]
    if record is not None:
      files.write(record, files.to_json({"minutes": minutes, "batches": whole, "evaluated": kept}))
    return kept

  decided = []
  hosts.on_main(lambda: decided.extend(decide()))
  kept = json.loads(hosts.gather(json.dumps(decided).encode())[0])  # all do as the first host
  if kept == whole:
    return list(cases), None
  cut = {key: first_batches(text, n) for (key, text), n in zip(texts.items(), kept, strict=True)}
  fitting = [
    dataclasses.replace(
      case, data=cut[id(case.data)], by_source={name: cut[id(text)] for name, text in case.by_source.items()}
    )
    for case in cases
  ]
  analysed = {id(case.data): case.data for case in cases}
  found = {
    "minutes": minutes,
    "tokens": sum(cut[key].tokens for key in analysed),
    "of": sum(text.tokens for text in analysed.values()),
    "batches": sum(len(cut[key].batches) for key in analysed),
    "of_batches": sum(len(text.batches) for text in analysed.values()),
  }
  found["why"] = (
    f"Only the first {found['tokens']:,} of {found['of']:,} tokens are evaluated, which fill {found['batches']:,} of "
    f"{found['of_batches']:,} batches: all of them were estimated to take longer than the limit of {minutes:g} minutes "
    "(config.analysis.minutes, or --minutes of analyze.py; 0 is no limit)."
  )
  return fitting, found


def first_batches(text: EvaluationSet, number: int) -> EvaluationSet:
  """The first batches of a text, or as many more as it takes until a token is scored."""
  while number < len(text.batches) and not any(scored(batch).any() for batch in text.batches[:number]):
    number += 1
  if number >= len(text.batches):
    return text
  ids = np.asarray(text.document_ids[:number])
  tokens = int((ids >= 0).sum())
  return dataclasses.replace(
    text,
    batches=text.batches[:number],
    document_ids=text.document_ids[:number],
    documents=int(ids.max()) + 1,
    tokens=tokens,
    complete=False,
    cut=0,  # "budget" says why there are no more tokens, not the number that was asked for
    limit=tokens,
  )


def duration(seconds: float) -> str:
  """ "40 s", "6 min" or "2.5 h"."""
  for name, unit in (("h", 3600), ("min", 60)):
    if seconds >= 1.5 * unit:
      return f"{seconds / unit:.2g} {name}"
  return f"{math.ceil(seconds)} s"
