"""The report of an analysis: terminal tables, `analysis.json`, `summary.json`, plots, CSV files and one page."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from tsparse import files
from tsparse.analysis import charts, page, plots
from tsparse.analysis.tables import Table, notes, tables


def write_report(analysis: dict, run: dict, folder: str | os.PathLike) -> Path:
  """Writes the analysis, its summary, PNGs, CSVs and the page into `folder`, and returns the path of `report.html`.

  Args:
    analysis: the dict of `analysis.json`; `definitions` inside it says what its numbers mean.
    run: the facts of the run (config, workdir, command, seconds, versions, git, device, ...), any JSON values. They
      open `summary.json` and close the page.
    folder: made if missing. Each file is replaced whole, so that a reader never meets half of one.

  The JSON is strict: a number that is not finite (an overflowed perplexity, a loss that is NaN) is written as null and
  shown as "not finite".
  """
  folder = Path(folder)
  (folder / "csv").mkdir(parents=True, exist_ok=True)
  analysis, run = files.strict(analysis), files.strict(run)
  drawn, names = charts.charts(analysis), [m["name"] for m in analysis["models"]]
  files.write(folder / "analysis.json", files.to_json(analysis))
  files.write(folder / "summary.json", files.to_json(summarize(analysis, run)))
  for chart in drawn:
    files.write(folder / f"{chart.key}.png", plots.png(plots.draw(chart, names)))
    files.write(folder / "csv" / f"{chart.key}.csv", to_csv(charts.rows(chart)))
  for table in tables(analysis):
    files.write(folder / "csv" / f"table_{table.key}.csv", to_csv([table.columns, *table.rows]))
  path = folder / "report.html"
  files.write(path, page.page(analysis, run, drawn))
  return path


def print_table(analysis: dict, console) -> None:
  """Prints the tables and their notes on a `rich.console.Console`; 80 columns are enough, and plain text reads well."""
  from rich.text import Text

  print_tables(tables(analysis), console)
  for note in notes(analysis):
    console.print(Text(note))


def print_tables(shown: Iterable[Table], console) -> None:
  """Prints tables on a `rich.console.Console`, each in parts where it is too wide."""
  from rich import box
  from rich.table import Table as RichTable
  from rich.text import Text

  for table in (part for whole in shown for part in _parts(whole, console.width)):
    # Headings break between words, so that a column is as wide as its numbers.
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, column in enumerate(table.columns):
      justify = "left" if i < table.labels else "right"
      heading, number = Text("\n".join(column.split())), i >= table.labels
      grid.add_column(heading, justify=justify, vertical="bottom", no_wrap=number, overflow="fold")
    for row in table.shown:
      grid.add_row(*map(Text, row))
    console.print(Text(table.title, style="bold"))
    console.print(grid)
    console.print()
    for note in table.notes:
      console.print(Text(note))
    if table.notes:
      console.print()


def summarize(analysis: dict, run: dict) -> dict:
  """The dict of `summary.json`: the facts of the run, a flat row per model, and the tables exactly as printed."""
  analysis = files.strict(analysis)
  models = []
  for m in analysis["models"]:
    dead, parameters = m.get("dead_neurons") or {}, m.get("parameters") or {}
    models.append({
      "name": m["name"],
      "activation": m["activation"],
      "trained_tokens": m.get("trained_tokens"),
      "loss": m["loss"],
      "perplexity": m["perplexity"],
      "zero_fraction": m["zero_fraction"]["mean"],
      "activated_parameters": parameters.get("activated"),
      "total_parameters": parameters.get("total"),
      "dead_neurons": dead.get("count"),
      "curve": m.get("curve") or [],
    })  # fmt: skip
  shown = [{"title": t.title, "columns": t.columns, "rows": t.shown} for t in tables(analysis)]
  return files.strict(run) | {"models": models, "tables": shown, "notes": notes(analysis)}


def _parts(table: Table, width: int) -> list[Table]:
  """The table, or tables of some of its groups of columns that fit `width` (one group may not)."""

  def needed(i):
    return 1 + max(map(len, [*table.columns[i].split(), *(row[i] for row in table.rows)]))

  count = len(table.columns)
  labels = list(range(table.labels))
  parts = [labels.copy()]
  for start in range(table.labels, count, table.group or count):
    group = list(range(start, min(start + (table.group or count), count)))
    if len(parts[-1]) > len(labels) and sum(map(needed, parts[-1] + group)) > width:
      parts.append(labels.copy())
    parts[-1] += group
  cut = [
    table._replace(
      columns=[table.columns[i] for i in part], rows=[[row[i] for i in part] for row in table.rows], notes=()
    )
    for part in parts
  ]
  return [*cut[:-1], cut[-1]._replace(notes=table.notes)]


def to_csv(rows: Iterable[Iterable]) -> str:
  """The text of a CSV file."""
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator="\n").writerows(rows)
  return buffer.getvalue()
