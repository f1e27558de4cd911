"""What experiments/data.py shows: the sources of a mixture, and the statistics of their text (tables, plot, JSON)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from tsparse import files
from tsparse.analysis.plots import COLOURS, GRID, INK, STYLE, png
from tsparse.analysis.tables import BLANK
from tsparse.data.inventory import Listed, inventory
from tsparse.data.overlap import Overlap, read_evaluations
from tsparse.data.settings import DataSettings
from tsparse.data.statistics import statistics
from tsparse.errors import UserError
from tsparse.progress import ProgressLine

OFTEN = 100  # documents between two looks at the progress bar


def is_weighted(name: str) -> bool:
  """Whether it is "name:weight,name:weight", what `config.data.mixture` takes, and not the name of a D."""
  for part in name.split(","):
    try:
      float(part.rpartition(":")[2])
    except ValueError:
      return False
  return ":" in name


def show_list(data: DataSettings):
  """Prints the sources of `data`: weights, found or missing, and how to get what is missing."""
  console, rows = Console(), inventory(data)
  table = _table("source", "category", "weight", "", "found at, or how to get it")
  for row in rows:
    table.add_row(row.name, row.category or BLANK, f"{row.weight:.2%}", *_found(row))
  console.print(table)
  console.print(f"{sum(bool(row.place) for row in rows)} of {len(rows)} sources found")


def _found(row: Listed) -> tuple[str, str]:
  return ("found", row.place) if row.place else ("missing", row.get)


def run(
  data: DataSettings,
  evaluations: Sequence[str],
  ngram: int,
  max_documents: int | None,
  budget: int | None,
  out: Path | None,
):
  """Reads the text, prints the tables and writes `out`/{statistics.json, statistics.png}; see `statistics`.

  Raises:
    UserError: anything of the data or the evaluation sets is wrong, or `out` is in use; then nothing is written.
  """
  if ngram < 1:
    raise UserError(f"--ngram={ngram}: an n-gram has at least one word.")
  console, overlap = Console(), Overlap(read_evaluations(evaluations), ngram)

  def progress(title: str, total: int, documents: Iterator) -> Iterator:
    number = 0
    with ProgressLine(console, title, 0, total) as line:
      for number, each in enumerate(documents, start=1):
        yield each
        if number % OFTEN == 0 and number != total:
          line.update(number, "")
      line.update(number, "")

  with files.new_folder(out) if out else contextlib.nullcontext() as folder:
    result = statistics(data, overlap, max_documents, budget, progress) | {"ngram": ngram}
    if folder:
      (folder / "statistics.json").write_text(files.to_json(result))
      (folder / "statistics.png").write_bytes(png(draw(result)))
  for table in tables(result):
    console.print(table)
    console.print()
  if out:
    console.print(f"written  {out}/statistics.json, {out}/statistics.png", highlight=False, soft_wrap=True)


def tables(result: dict[str, Any]) -> list[Table]:
  """The tables that are printed."""
  budget, sources = result["budget"], result["sources"]
  text = _table("source", *["documents", "bytes", "tokens", "B/token", "weight", "share"], title="Text to train on")
  clean = _table("source", *["copies", "elsewhere", "skipped", "malformed"], title="What is wrong with it")
  if budget:
    text.add_column("epochs", justify="right")
    text.caption, text.caption_justify = f"Epochs: of {budget:,} tokens drawn.", "left"
  for s in sources:
    seen = f"{s['measured']:,}" + ("" if s["measured"] == s["documents"] else f" of {_number(s['documents'], ',')}")
    shares = f"{s['weight']:.2%}", _number(s["share"], ".2%")
    epochs = [_number(s["epochs"], ".3g")] if budget else []
    per_token = _number(s["bytes_per_token"], ".2f")
    text.add_row(s["name"], seen, decimal(s["bytes"]), f"{s['tokens']:,}", per_token, *shares, *epochs)
    clean.add_row(s["name"], *(f"{s[key]:,}" for key in ("copies", "elsewhere", "skipped", "malformed")))
  if not result["evaluations"]:
    return [text, clean]
  title = f"Evaluation items with {result['ngram']} words in a row of the text"
  found = _table("evaluation set", "items", "too short", "found", "share", "found in", title=title)
  for name, e in result["evaluations"].items():
    where = ", ".join(f"{s['name']} {s['overlap'][name]:,}" for s in sources if s["overlap"][name])
    found.add_row(
      name, *(f"{e[key]:,}" for key in ("items", "short", "found")), _number(e["share"], ".2%"), where or BLANK
    )
  return [text, clean, found]


def _table(*columns: str, title: str | None = None) -> Table:
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
  for column in columns:
    is_text = column in ("", "source", "category", "evaluation set", "found in", "found at, or how to get it")
    table.add_column(column, justify="left" if is_text else "right", no_wrap=column == "source")
  return table


def _number(value: float | None, form: str) -> str:
  return "unknown" if value is None else format(value, form)


def draw(result: dict[str, Any]):
  """A Figure: of each source the weight beside its share of the text, and how long its documents are."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator, PercentFormatter

  sources = result["sources"]
  names, rows = [s["name"] for s in sources], range(len(sources))
  bins = max(len(s["lengths"]) for s in sources) or 1
  first = min((next((i for i, n in enumerate(s["lengths"]) if n), bins - 1) for s in sources), default=0)
  shares = [[n / max(1, sum(s["lengths"])) for n in s["lengths"]] + [0.0] * (bins - len(s["lengths"])) for s in sources]
  with rc_context(STYLE):
    figure = Figure(figsize=(11, 1.9 + 0.42 * len(sources)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.3])
    for offset, key, label, colour in (
      (-0.2, "weight", "drawn in training", COLOURS[0]),
      (0.2, "share", "held by the source", GRID),
    ):
      left.barh([row + offset for row in rows], [s[key] or 0 for s in sources], 0.36, color=colour, label=label)
    left.set(title="Share of the tokens", ylim=(len(sources) - 0.5, -0.5))
    left.set_yticks(rows, names)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    left.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    left.grid(axis="x", color=GRID, alpha=0.25, lw=0.7)
    left.set_axisbelow(True)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, labelcolor=INK, fontsize=10)
    image = right.imshow(
      [[share or math.nan for share in row[first:]] for row in shares],
      aspect="auto", cmap="Blues", vmin=0, extent=(first, bins, len(sources) - 0.5, -0.5),
    )  # fmt: skip
    right.set(title="Documents by their length", xlabel="tokens, from the left edge of a box to its right")
    ticks = range(first, bins + 1, max(1, -(-(bins - first) // 7)))
    right.set_xticks(ticks, [_short(2**i) for i in ticks])
    figure.colorbar(image, ax=right, format=PercentFormatter(1.0, decimals=None))
    for axes in (left, right):
      axes.tick_params(length=0, pad=7)
  return figure


def _short(number: int) -> str:
  power = min(3, (number.bit_length() - 1) // 10)
  return f"{number >> 10 * power}{('', 'Ki', 'Mi', 'Gi')[power]}"
