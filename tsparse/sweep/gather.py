"""The results of a sweep side by side: sweep.csv, sweep.png, a table, and the report that an analysis of models has;
frontier.png too, what zeros cost, where the runs have a control.

A run counts by its last model: the recovered one of a ReLUfication, that of the last phase where there are phases.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tsparse import files
from tsparse.analysis import gap
from tsparse.analysis.charts import PERPLEXITY, Axis, Chart, Interval, Series, View
from tsparse.analysis.plots import draw_beside, png
from tsparse.analysis.report import print_tables, to_csv, write_report
from tsparse.analysis.tables import Table, count, masked, notes, number, percent, perplexity, tokens_unlike_most
from tsparse.sweep.runs import Run, labels, title_of

UNITS = ((1e9, "billions of tokens"), (1e6, "millions of tokens"), (1e3, "thousands of tokens"))
ZEROS = Axis("hidden entries that are zero", percent=True)


def gather(runs: Sequence[Run], folder: Path, states: Mapping[str, tuple[str, str]], console: Console):
  """Writes and prints what there is; `states` has the state of each run by name and, where it is not done, why not."""
  models = {run.name: _models(run) for run in runs if run.state == "done"}
  folder.mkdir(parents=True, exist_ok=True)
  files.write(folder / "sweep.csv", to_csv(csv_rows(runs, models, states)))
  print_tables([table(runs, models, states)], console)
  if not models:
    return
  done = [run for run in runs if run.name in models]
  last = [models[run.name][-1] | {"name": run.title} for run in done]
  print_tables(masked(last), console)
  for note in notes({"models": last}):
    console.print(Text(note))
  drawn = list(charts(done, last))
  files.write(folder / "sweep.png", png(draw_beside(*zip(*drawn, strict=True))))
  definitions = json.loads((done[0].workdir / "report" / "analysis.json").read_text())["definitions"]
  facts = {"sweep": str(folder), "runs": {run.title: str(run.workdir) for run in done}}
  write_report({"models": last, "definitions": definitions}, facts, folder / "report")
  made = [("results", "sweep.csv"), ("picture", "sweep.png"), ("report", "report/report.html")]
  if chart := frontier(last):
    names = [series.model for series in chart.views[0].data]
    files.write(folder / "frontier.png", png(draw_beside([chart], [names], height=5.8, width=9)))
    made.insert(2, ("frontier", "frontier.png"))
  for what, name in made:
    console.print(f"{what}  {folder / name}", highlight=False, markup=False, soft_wrap=True)


def table(runs: Sequence[Run], models: Mapping[str, list[dict]], states: Mapping[str, tuple[str, str]]) -> Table:
  """A row for each run: what differs, and its last model."""
  rows, compared = [], any("gap" in found[-1] for found in models.values())
  unfinished = any(state != "done" for state, _ in states.values())
  for run in runs:
    cells = [*map(str, run.values.values()), *[states[run.name][0]] * unfinished]
    if run.name in models:
      m = models[run.name][-1]
      parameters = m.get("parameters") or {}
      cells += [number(m["loss"]), perplexity(m["perplexity"]), percent(m["zero_fraction"]["mean"])]
      cells += [above_control(m)] * compared
      cells += [count(parameters.get("activated"), parameters.get("total")), count(m.get("trained_tokens"))]
    rows.append(cells)
  short = [*labels(list(runs[0].values)).values(), *["state"] * unfinished]
  cost = ["loss above control"] * compared
  columns = [*short, "loss", "perplexity", "zeros", *cost, "activated parameters", "tokens seen"]
  rows = [cells + [""] * (len(columns) - len(cells)) for cells in rows]
  reasons = tuple(f"{name} {state}: {why}" for name, (state, why) in states.items() if why)
  return Table("The runs, nothing masked", columns, rows, len(short), key="sweep", notes=reasons)


def above_control(model: dict[str, Any]) -> str:
  """The gap with half of its interval, "+0.081 +-0.004", or without where there is none."""
  difference, bounds = model.get("gap") or (None, None)
  if difference is None:
    return ""
  return f"{difference:+.3f}" + (f" ±{(bounds[1] - bounds[0]) / 2:.3f}" if bounds else "")


def csv_rows(
  runs: Sequence[Run], models: Mapping[str, list[dict]], states: Mapping[str, tuple[str, str]]
) -> Iterator[list]:
  """A row for each model of each run, and one for each run that has none; a heading first."""
  levels = sorted({p["sparsity"] for found in models.values() for m in found for p in m.get("curve") or ()} - {0.0})
  heading = [
    "run", *runs[0].values, "state", "why", "model", "activation", "trained_tokens", "training_loss", "loss",
    "perplexity", "zero_fraction", "loss_above_control", "gap_low", "gap_high", "dead_neurons", "activated_parameters",
    "total_parameters",
    *(f"perplexity_masked_{level:g}" for level in levels),
  ]  # fmt: skip
  yield heading
  for run in runs:
    start = [run.name, *run.values.values(), *states[run.name]]
    for m in models.get(run.name, ()):
      difference, bounds = m.get("gap") or (None, None)
      parameters, curve = m.get("parameters") or {}, {p["sparsity"]: p["perplexity"] for p in m.get("curve") or ()}
      yield [
        *start, m["name"], m["activation"], m.get("trained_tokens"), m.get("training_loss"), m["loss"], m["perplexity"],
        m["zero_fraction"]["mean"], difference, *(bounds or (None, None)), (m.get("dead_neurons") or {}).get("count"),
        parameters.get("activated"), parameters.get("total"), *(curve.get(level) for level in levels),
      ]  # fmt: skip
    if run.name not in models:
      yield start + [""] * (len(heading) - len(start))


def charts(runs: Sequence[Run], models: Sequence[dict]) -> Iterator[tuple[Chart, list[str]]]:
  """Each chart of the picture, with the names of its lines: perplexity, zeros, and the loss while training.

  Over a field whose values are numbers, perplexity and zeros are lines, one for each combination of the others;
  without such a field, a row for each run, with its 95% interval.
  """
  fields = [field for field in runs[0].values if all(_is_number(run.values[field]) for run in runs)]
  numeric = {field: n for field in fields if (n := len({run.values[field] for run in runs})) > 1}
  measured = (("perplexity", "Perplexity", PERPLEXITY), ("zero_fraction", "Zeros", ZEROS))
  for key, title, axis in measured:
    values = [m[key]["mean"] if key == "zero_fraction" else m[key] for m in models]
    if numeric:
      x = max(numeric, key=numeric.get)
      lines: dict[str, list] = {}
      for run, value in zip(runs, values, strict=True):
        name = title_of(run.values, [field for field in run.values if field != x])
        lines.setdefault(name, []).extend([[run.values[x], value]] * (value is not None))
      series = [Series(name, sorted(points)) for name, points in lines.items() if points]
      view, kind, names = View("", Axis(x.rpartition(".")[2], scale="auto"), axis, series), "lines", list(lines)
    else:
      names = [m["name"] for m in models]
      found = []
      for m, value in zip(models, values, strict=True):
        low, high = (m.get("confidence") or {}).get(key) or (None, None)
        if value is not None:
          found.append(Interval(m["name"], value, value if low is None else low, value if high is None else high))
      view, kind = View("", axis._replace(scale="linear"), Axis(""), found), "intervals"
    yield Chart(key, title, kind, [view], ()), names
  learning = {run.title: points for run in runs if (points := _learning(run))}
  if learning:
    most = max(points[-1][0] for points in learning.values())
    unit, name = next((u for u in UNITS if most >= u[0]), (1, "tokens"))
    lines = [Series(title, [[tokens / unit, loss] for tokens, loss in points]) for title, points in learning.items()]
    view = View("", Axis(f"{name} seen"), Axis("loss on held-out text, nats per token"), lines)
    yield Chart("learning", "While training", "lines", [view], ()), list(learning)


def frontier(models: Sequence[dict]) -> Chart | None:
  """Loss above the control by zeros, a point for each run; None where fewer than two have a control.

  Runs that have read another number of tokens than most say how many.
  """
  models = [m for m in models if "gap" in m]
  if len(models) < 2:
    return None
  _, others = tokens_unlike_most(models)
  names = [m["name"] + (f" ({count(others[m['name']])} tokens)" if m["name"] in others else "") for m in models]
  points = [Series(name, [[m["zero_fraction"]["mean"], m["gap"][0]]]) for name, m in zip(names, models, strict=True)]
  losses = [0.0, *(series.points[0][1] for series in points)]
  limits = 1.1 * min(losses), 1.1 * max(losses)
  view = View("", ZEROS, Axis("loss above the control, nats per token", limits=limits), points)
  return Chart("frontier", "What zeros cost", "points", [view], ())


def _models(run: Run) -> list[dict[str, Any]]:
  """The models of the run's report; `gap` of those that it compares with a control: the loss above it, its interval."""
  analysis = json.loads((run.workdir / "report" / "analysis.json").read_text())
  gaps = {
    m["name"]: (loss, bounds) for m, loss, bounds in gap.gaps(analysis["models"], analysis.get("comparisons") or [])
  }
  return [m | ({"gap": gaps[m["name"]]} if m["name"] in gaps else {}) for m in analysis["models"]]


def _learning(run: Run) -> list[list[float]]:
  """[tokens, loss on held-out text] of the main stage."""
  path = run.workdir / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  each = run.config.train.batch_size * run.config.train.seq_len
  before = next((line["tokens_seen"] - line["step"] * each for line in lines if "tokens_seen" in line), 0)
  known = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
  return [[before + step * each, loss] for step, loss in known]


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
