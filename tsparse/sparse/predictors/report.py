"""What is shown of predictors: tables in the terminal, quality.json, quality.png."""

import math
from pathlib import Path
from typing import Any

from tsparse import files
from tsparse.analysis.tables import BLANK

LABELS = {"trained": "trained", "svd": "SVD of gate", "merged": "merged"}


def write(found: dict[str, Any], folder: Path):
  """Writes quality.json and quality.png of what run.py found into `folder`."""
  found = files.strict(found)
  files.write(folder / "quality.json", files.to_json(found))
  files.write(folder / "quality.png", png(found))


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, columns, rows) of the tables; the first column is text, the others are numbers."""
  found = files.strict(found)
  natural, predictors, size = found["natural"], found["predictors"], found["bytes_per_weight"]
  reads = predictors[0]["read"]
  first = [["none (off)", "", "", "", "", *_read(reads, "dense", size), _number(natural["perplexity"], 3)]]
  first += [["none (exact)", "", "", "", "", *_read(reads, "exact", size), _number(natural["perplexity"], 3)]]
  first += [
    [
      LABELS[p["name"]],
      f"{sum(p['ranks']) / len(p['ranks']):.0f}",
      *(_percent(p[name]) for name in ("recall", "precision", "predicted_sparsity")),
      *_read(p["read"], "predictor", size),
      _number(p["perplexity"], 3),
    ]
    for p in predictors
  ]
  head = ["mask", "mean rank", "recall", "precision", "predicted sparsity"]
  head += ["kB read", "of dense", "kFLOPs", "perplexity"]
  result = [(f"Predictors at a target recall of {_percent(found['target_recall'])}, FFN only, one token", head, first)]
  layers = [
    [
      str(layer),
      _percent(natural["zeros_per_layer"][layer]),
      *(
        cell
        for p in predictors
        for cell in (
          str(p["ranks"][layer]),
          *(_percent(p["per_layer"][name][layer]) for name in ("recall", "precision", "predicted_sparsity")),
        )
      ),
    ]
    for layer in range(len(natural["zeros_per_layer"]))
  ]
  what = ("rank", "recall", "precision", "skipped")
  head = ["layer", "zeros", *(f"{p['name']} {column}" for p in predictors for column in what)]
  result.append(("By layer", head, layers))
  swept = [p for p in predictors if p["curve"]]
  rows = [
    [
      _percent(points[0]["target"]),
      *(
        cell
        for point in points
        for cell in (_percent(point["recall"]), _percent(point["predicted_sparsity"]), _number(point["perplexity"], 3))
      ),
    ]
    for points in zip(*(p["curve"] for p in swept), strict=True)
  ]
  head = ["target recall", *(f"{p['name']} {what}" for p in swept for what in ("recall", "skipped", "perplexity"))]
  result.append(("By target recall; `skipped` is the predicted sparsity", head, rows))
  return result


def show(found: dict[str, Any], console) -> None:
  """Prints the tables on a `rich.console.Console`."""
  from rich import box
  from rich.table import Table
  from rich.text import Text

  for title, columns, rows in tables(found):
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
      heading, justify = Text("\n".join(column.split())), "right" if i else "left"
      grid.add_column(heading, justify=justify, vertical="bottom", no_wrap=True)
    for row in rows:
      grid.add_row(*(Text(cell or BLANK) for cell in row))
    console.print(Text(title, style="bold"))
    grid.width = console.measure(grid, options=console.options.update(max_width=1000)).maximum
    console.print(grid, crop=False)  # a narrow terminal wraps its lines: no number is cut off
    console.print()


def png(found: dict[str, Any]) -> bytes:
  """Recall and perplexity against predicted sparsity, and the layers, as one picture."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator, PercentFormatter

  from tsparse.analysis.plots import COLOURS, GRID, INK, MARKERS, STYLE
  from tsparse.analysis.plots import png as drawn

  natural, predictors = found["natural"], found["predictors"]
  with rc_context(STYLE):
    figure = Figure(figsize=(13.6, 4.2), layout="constrained")
    tradeoff, perplexity, layers = figure.subplots(1, 3)
    for axes in (tradeoff, perplexity, layers):
      axes.grid(color=GRID, alpha=0.25, lw=0.7)
      axes.tick_params(length=0, pad=7)
    for axes in (tradeoff, perplexity):
      axes.axvline(natural["zero_fraction"], color=GRID, lw=1.5, ls=(0, (4, 3)))
      axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
      axes.set_xlabel("predicted sparsity: entries not computed")
    for i, p in enumerate(predictors):
      colour, label = COLOURS[i], LABELS[p["name"]]
      if p["tradeoff"]:
        tradeoff.plot(*zip(*p["tradeoff"], strict=True), color=colour, lw=2, label=label)
      tradeoff.plot([p["predicted_sparsity"]], [p["recall"]], MARKERS[i], color=colour, ms=8, clip_on=False)
      points = [(q["predicted_sparsity"], q["perplexity"]) for q in p["curve"] if q["perplexity"] is not None]
      points = points or [(p["predicted_sparsity"], p["perplexity"])]
      perplexity.plot(*zip(*points, strict=True), color=colour, lw=2, marker=MARKERS[i], ms=6, label=label)
      layers.plot(p["per_layer"]["predicted_sparsity"], color=colour, lw=2, marker=MARKERS[i], ms=5)
    layers.plot(natural["zeros_per_layer"], color=GRID, lw=1.5, ls=(0, (4, 3)))
    perplexity.axhline(natural["perplexity"], color=GRID, lw=1.5, ls=(0, (1, 1.5)), label="perplexity without a mask")
    best = [q["perplexity"] for p in predictors for q in p["curve"] if q["perplexity"] is not None]
    if best and max(best) > 3 * natural["perplexity"]:
      perplexity.set_yscale("log")
    tradeoff.plot([], [], color=GRID, lw=1.5, ls=(0, (4, 3)), label="zeros of the model")
    tradeoff.set(ylim=(0.5, 1.01), ylabel="recall: share of what fires that is kept", title="Recall")
    tradeoff.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    perplexity.set(ylabel="perplexity", title="Perplexity under the mask")
    layers.set(xlabel="layer", ylabel="share of entries", title=f"By layer, target recall {found['target_recall']:.0%}")
    layers.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    layers.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (tradeoff, perplexity):  # the layers' lines are those of the first, and fill their plot
      axes.legend(loc="best", frameon=False, labelcolor=INK, fontsize=10)
  return drawn(figure)


def _read(read: dict[str, float], name: str, size: int) -> list[str]:
  """kB, share of dense, and thousands of operations."""
  return [f"{read[name] * size / 1e3:,.1f}", _percent(read[name] / read["dense"]), f"{2 * read[name] / 1e3:,.1f}"]


def _percent(share: float | None) -> str:
  return "" if share is None else f"{share:.1%}"


def _number(value: float | None, digits: int) -> str:
  return "not finite" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"
