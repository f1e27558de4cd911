"""What an evaluation shows and writes: tables, CSV, lm-eval's JSON for each setting, and accuracy against sparsity."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsparse import files
from tsparse.analysis import plots
from tsparse.analysis.charts import Axis, Chart, Series, View
from tsparse.analysis.report import to_csv
from tsparse.analysis.tables import Table

ACCURACIES = ("acc", "acc_norm", "exact_match")
DEFINITIONS = {
  "stderr": "standard error of the mean over the questions; of metrics that are no mean, of bootstrap_iters resamples",
  "mean": "the mean over the tasks of a suite, each by the metric shown",
}


def scores(results: Sequence[Mapping[str, Any]], shown: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
  """Rows of the table: task, shots, metric, and the value and stderr of each of the settings, None where there is none.

  Args:
    results: of each setting, as lm-eval lays them out.
    shown: (task, metric or "" for all) in the order of the rows.
  """
  rows = []
  for task, wanted in shown:
    of_task = [result["results"][task] for result in results]
    found = [
      key for key, value in of_task[0].items() if "," in key and "_stderr," not in key and not isinstance(value, str)
    ]
    keys = [key for key in found if not wanted or wanted in (key, key.partition(",")[0])]
    for key in keys:
      metric, _, filtered = key.partition(",")
      error = f"{metric}_stderr,{filtered}"
      rows.append({
        "task": task,
        "shots": results[0]["n-shot"].get(task),
        "metric": metric if filtered == "none" else f"{metric} ({filtered})",
        "values": [float(each[key]) for each in of_task],
        "stderr": [e if isinstance(e := each.get(error), float) else None for each in of_task],
      })  # fmt: skip
  return rows


def suite_means(rows: Sequence[Mapping[str, Any]], suites: Mapping[str, Sequence]) -> dict[str, list[float]]:
  """Mean over the tasks of each suite, for each setting."""
  means = {}
  for name, parts in suites.items():
    of_suite = [next(row for row in rows if _is(row, part)) for part in parts]
    means[name] = [sum(values) / len(parts) for values in zip(*(row["values"] for row in of_suite), strict=True)]
  return means


def _is(row: Mapping[str, Any], part: Any) -> bool:
  metric, _, filtered = part.metric.partition(",")
  return row["task"] == part.task and row["metric"] == (f"{metric} ({filtered})" if filtered else metric)


def table(evaluation: Mapping[str, Any]) -> Table:
  """One row for each score, one column for each setting."""
  settings, rows = evaluation["settings"], []
  for row in evaluation["scores"]:
    cells = [_cell(*pair) for pair in zip(row["values"], row["stderr"], strict=True)]
    rows.append([row["task"], "" if row["shots"] is None else str(row["shots"]), row["metric"], *cells])
  for name, means in evaluation["suites"].items():
    rows.append([name, "", "mean", *(_cell(mean, None) for mean in means)])
  zeros = [setting["zero_fraction"] for setting in settings]
  if any(share is not None for share in zeros):
    rows.append(["zeros in the hidden", "", "", *("" if share is None else f"{share:.1%}" for share in zeros)])
  columns = ["task", "shots", "metric", *(setting["name"] for setting in settings)]
  return Table(evaluation["model"], columns, rows, labels=3, group=1, key="scores")


def _cell(value: float, error: float | None) -> str:
  return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def chart(evaluation: Mapping[str, Any]) -> Chart | None:
  """Accuracies of each task against the level of top-k masks; None where there are fewer than two levels."""
  levels = [
    0.0 if s["name"] == "off" else s["level"] if s["method"] == "topk" else None for s in evaluation["settings"]
  ]
  rows = [row for row in evaluation["scores"] if row["metric"].partition(" ")[0] in ACCURACIES]
  drawn = [(row["task"], row["metric"], row["values"]) for row in rows]
  drawn += [(suite, "mean", means) for suite, means in evaluation["suites"].items() if rows]
  series = []
  for name, metric, values in drawn:
    points = {level: value for level, value in zip(levels, values, strict=True) if level is not None}
    series.append(Series(name, [list(point) for point in sorted(points.items())], metric))
  if not series or len(series[0].points) < 2:
    return None
  values = [value for each in series for _, value in each.points]
  low, high = min(values), max(values)
  room = max(0.05, high - low)  # above the lines for the legend
  limits = max(0.0, low - 0.1 * room), min(1.02, high + 0.4 * room)
  axes = Axis("share of the hidden set to zero per token", percent=True), Axis("accuracy", percent=True, limits=limits)
  return Chart("accuracy", "Accuracy under the top-k mask", "lines", [View("", *axes, series)], ())


def write(
  evaluation: Mapping[str, Any],
  results: Sequence[Mapping[str, Any]],
  samples: Sequence[Mapping[str, Any]],
  folder: Path,
) -> None:
  """Writes evaluation.json, scores.csv, accuracy.png, and of each setting results_NAME.json, samples_NAME_TASK.jsonl.

  Args:
    evaluation: what run.py returns.
    results: of each setting, as lm-eval lays them out.
    samples: of each setting, task -> its questions and answers; empty for none.
    folder: exists.
  """
  files.write(folder / "evaluation.json", files.to_json(evaluation))
  shown = table(evaluation)
  files.write(folder / "scores.csv", to_csv([shown.columns, *shown.rows]))
  drawn = chart(evaluation)
  if drawn is not None:
    names = list(dict.fromkeys(series.model for series in drawn.views[0].data))
    files.write(folder / "accuracy.png", plots.png(plots.draw(drawn, names)))
  for setting, result in zip(evaluation["settings"], results, strict=True):
    files.write(folder / f"results_{_file_name(setting['name'])}.json", files.to_json(result))
  for setting, by_task in zip(evaluation["settings"], samples, strict=bool(samples)):
    for task, asked in by_task.items():
      lines = "".join(json.dumps(files.strict(_laid_out(one)), ensure_ascii=False) + "\n" for one in asked)
      files.write(folder / f"samples_{_file_name(setting['name'])}_{_file_name(task)}.jsonl", lines)


def _file_name(name: str) -> str:
  return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


def _laid_out(sample: Mapping[str, Any]) -> dict[str, Any]:
  """A sample with its arguments as lm-eval writes them: {"gen_args_0": {"arg_0": ...}}."""
  arguments = {
    f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(each)} for i, each in enumerate(sample["arguments"])
  }
  return {**sample, "arguments": arguments}
