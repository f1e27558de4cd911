"""The report of an analysis: terminal tables, `analysis.json`, `summary.json`, two plots and one self-contained page.

Every table is made once, by `tables`, from the numbers as JSON stores them; terminal, page and summary print its cells.
"""

import html
import json
import os
from pathlib import Path
from string import Template
from typing import NamedTuple

from tsparse import files
from tsparse.analysis import plots

TEMPLATE = Path(__file__).with_name("report.html")


class Table(NamedTuple):
  """A table ready to print: the first `labels` columns are text, the others right-aligned numbers.

  Where the whole is too wide for a terminal it is printed in parts, cut only between groups of `group` columns.
  """

  title: str
  columns: list[str]
  rows: list[list[str]]
  labels: int = 1
  group: int = 0  # 0: never cut


def write_report(analysis: dict, run: dict, folder: str | os.PathLike) -> Path:
  """Writes the analysis, its summary, the plots and the page into `folder`, and returns the path of `report.html`.

  Args:
    analysis: the dict of `analysis.json`; `definitions` inside it says what its numbers mean.
    run: the facts of the run (config, workdir, command, seconds, versions, git, device, ...), any JSON values. They
      open `summary.json` and close the page.
    folder: made if missing. Each file is replaced whole, so that a reader never meets half of one.

  The JSON is strict: a number that is not finite (an overflowed perplexity, a loss that is NaN) is written as null and
  shown as "not finite".
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  analysis, run = files.strict(analysis), files.strict(run)
  figures = {
    "perplexity_vs_sparsity": plots.perplexity_vs_sparsity(analysis),
    "zeros_per_layer": plots.zeros_per_layer(analysis),
  }
  files.write(folder / "analysis.json", files.to_json(analysis))
  files.write(folder / "summary.json", files.to_json(summarize(analysis, run)))
  for name, figure in figures.items():
    files.write(folder / f"{name}.png", plots.png(figure))
  page = folder / "report.html"
  files.write(page, _page(analysis, run, figures))
  return page


def print_table(analysis: dict, console) -> None:
  """Prints the tables and their notes on a `rich.console.Console`; 80 columns are enough, and plain text reads well."""
  from rich import box
  from rich.table import Table as RichTable
  from rich.text import Text

  for table in (part for whole in tables(analysis) for part in _parts(whole, console.width)):
    # Headings break between words, so that a column is as wide as its numbers.
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, column in enumerate(table.columns):
      justify = "left" if i < table.labels else "right"
      heading, number = Text("\n".join(column.split())), i >= table.labels
      grid.add_column(heading, justify=justify, vertical="bottom", no_wrap=number, overflow="fold")
    for row in table.rows:
      grid.add_row(*map(Text, row))
    console.print(Text(table.title, style="bold"))
    console.print(grid)
    console.print()
  for note in notes(analysis):
    console.print(Text(note))


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
  shown = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables(analysis)]
  return files.strict(run) | {"models": models, "tables": shown, "notes": notes(analysis)}


def tables(analysis: dict) -> list[Table]:
  """The tables everyone prints: one row per model, and (where a model was masked) perplexity by level of sparsity."""
  models = files.strict(analysis)["models"]
  columns = ["model", "activation", "tokens seen", "loss", "perplexity", "zeros", "activated parameters"]
  rows = []
  for m in models:
    share, parameters = m["zero_fraction"]["mean"], m.get("parameters") or {}
    rows.append([
      m["name"],
      m["activation"],
      _count(m.get("trained_tokens")),
      _loss(m["loss"]),
      _perplexity(m["perplexity"]),
      _share(share),
      f"{_count(parameters.get('activated'), parameters.get('total'))} of {_count(parameters.get('total'))}",
    ])  # fmt: skip
  result = [Table("Quality and zeros, nothing masked", columns, rows, labels=2)]

  curves = {m["name"]: {0.0: m["perplexity"]} | _curve(m) for m in models if any(level > 0 for level in _curve(m))}
  if curves:
    rows = []
    for level in sorted({level for curve in curves.values() for level in curve}):
      row = [f"{100 * level:.4g}%"]
      for curve in curves.values():
        row += [_perplexity(curve[level]), _change(curve, level)] if level in curve else ["", ""]
      rows.append(row)
    columns = ["sparsity", *(heading for name in curves for heading in (name, "change"))]
    result.append(Table("Masked perplexity, by share of hidden entries set to zero per token", columns, rows, group=2))
  return result + _source_tables(files.strict(analysis))


def _source_tables(analysis: dict) -> list[Table]:
  """Of mixtures: loss and zeros of every model on what each source holds out, and what each stage drew from each."""
  result = []
  models = [m for m in analysis["models"] if m.get("sources")]
  if models:
    columns = ["source", *(f"{name} {what}" for name in (m["name"] for m in models) for what in ("loss", "zeros"))]
    rows = []
    for name in dict.fromkeys(source["name"] for m in models for source in m["sources"]):
      row = [name]
      for m in models:
        found = next((source for source in m["sources"] if source["name"] == name), None)
        row += [_loss(found["loss"]), _share(found["zero_fraction"])] if found else ["", ""]
      rows.append(row)
    result.append(Table("Held-out loss by source of the data, nats per token", columns, rows, group=2))
  drawn = {"training": analysis.get("sources") or []} | {f"phase {k}": v for k, v in analysis.get("phases", {}).items()}
  for stage, sources in drawn.items():
    if len(drawn) > 1 or len(sources) > 1 or any(source["malformed"] for source in sources):
      result.append(_drawn_table(f"What {stage} drew from each source", sources))
  return result


def _drawn_table(title: str, sources: list[dict]) -> Table:
  columns = ["source", "category", "tokens drawn", "share", "target", "epochs", "lines skipped"]
  rows = []
  for source in sources:
    epochs = "unknown" if source["epochs"] is None else f"{source['epochs']:.2f}"
    skipped = f"{source['skipped']:,}" + (f" and {source['malformed']:,} malformed" if source["malformed"] else "")
    share, target = f"{source['share']:.2%}", f"{source['target']:.2%}"
    rows.append([source["name"], source["category"], _count(source["tokens"]), share, target, epochs, skipped])
  return Table(title, columns, rows, labels=2)


def notes(analysis: dict) -> list[str]:
  """The sentences that belong under the tables: what was evaluated, and what a comparison of losses cannot tell."""
  models = files.strict(analysis)["models"]
  result = []
  for data in dict.fromkeys((m["data"], m.get("tokens"), m.get("documents")) for m in models):
    names = [m["name"] for m in models if (m["data"], m.get("tokens"), m.get("documents")) == data]
    who = "" if len(names) == len(models) else f" ({', '.join(names)})"
    documents = "" if data[2] is None else f" in {data[2]:,} document{'s' * (data[2] != 1)}"
    tokens = "" if data[1] is None else f", {data[1]:,} tokens{documents}"
    result.append(f"Evaluated{who} on {data[0]}{tokens}; loss is in nats per token.")
  vocabularies = {m["name"]: m.get("vocabulary") for m in models}
  if len(set(vocabularies.values())) > 1:
    named = ", ".join(f"{name} {vocabulary}" for name, vocabulary in vocabularies.items())
    result.append(f"Vocabularies differ ({named}): losses and perplexities are per token of each and do not compare.")
  seen = {m["name"]: m.get("trained_tokens") for m in models}
  if len(set(seen.values())) > 1:
    counts = ", ".join(f"{name} {_count(n)}" for name, n in seen.items())
    result.append(f"Tokens seen differ ({counts}): part of a lower loss can be plain further training.")
  return result


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
  return [
    table._replace(columns=[table.columns[i] for i in part], rows=[[row[i] for i in part] for row in table.rows])
    for part in parts
  ]


def _curve(model) -> dict:
  return {round(p["sparsity"], 6): p["perplexity"] for p in model.get("curve") or ()}


def _count(n, scale=None) -> str:
  """1234567 as 1.23M. `scale` chooses the unit, so that two counts of one cell share it."""
  if n is None:
    return "unknown"
  for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    if max(n, scale or 0) >= unit:
      return f"{n / unit:.2f}{name}"
  return f"{n:,}"


def _loss(value) -> str:
  return "not finite" if value is None else f"{value:.3f}"


def _share(value) -> str:
  return "not finite" if value is None else f"{value:.1%}"


def _perplexity(value) -> str:
  if value is None:
    return "not finite"
  return f"{value:,.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def _change(curve, level) -> str:
  """Relative to the unmasked perplexity: a percentage, or from ten times on the factor."""
  if level == 0 or not curve[0.0] or curve[level] is None:
    return ""
  ratio = curve[level] / curve[0.0]
  return f"{ratio - 1:+.1%}".replace("-0.0%", "+0.0%") if ratio < 10 else f"×{_perplexity(ratio)}"


def _page(analysis, run, figures) -> str:
  definitions = dict(analysis.get("definitions") or {})
  for m in analysis["models"]:
    definitions.setdefault("activated", (m.get("parameters") or {}).get("definition"))
  under = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes(analysis))
  first, *others = map(_html_table, tables(analysis))
  return Template(TEMPLATE.read_text()).substitute(
    title=html.escape(str(run.get("config") or "Activation sparsity")),
    tables="\n".join([first, under, *others]),
    definitions=_html_list({k.replace("_", " "): html.escape(str(v)) for k, v in definitions.items() if v}),
    plots="\n".join(
      f'<figure role="img" aria-label="{name.replace("_", " ")}">\n{plots.svg(figure)}</figure>'
      for name, figure in figures.items()
    ),
    details=_html_table(_details(analysis)),
    facts=_html_list({key: _fact(key, value) for key, value in run.items() if value is not None}),
  )


def _details(analysis) -> Table:
  """What was measured where: too wide for a terminal, so only on the page."""
  rows = []
  for m in analysis["models"]:
    dead = m.get("dead_neurons")
    dead = f"{dead['count']:,} of {dead['total']:,}" if dead else "unknown"
    rows.append([m["name"], str(m["model"]), m["data"], f"{m['tokens']:,}", dead])
  return Table("The models", ["model", "read from", "evaluated on", "tokens evaluated", "dead neurons"], rows, labels=3)


def _html_table(table: Table) -> str:
  def cell(tag, i, text):
    scope = ' scope="row"' if tag == "th" else ""
    return f"<{tag}{scope}{'' if i < table.labels else ' class=number'}>{html.escape(text)}</{tag}>"

  head = "".join(cell("th", i, c).replace('"row"', '"col"') for i, c in enumerate(table.columns))
  body = "".join(f"<tr>{''.join(cell('td' if i else 'th', i, c) for i, c in enumerate(r))}</tr>\n" for r in table.rows)
  grid = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
  return f'<h2>{html.escape(table.title)}</h2>\n<div class="wide">{grid}</div>'


def _html_list(items: dict) -> str:
  return "\n".join(f"<dt>{html.escape(key)}</dt><dd>{value}</dd>" for key, value in items.items())


def _fact(key, value) -> str:
  if isinstance(value, dict):
    unit = " s" if key == "seconds" else ""
    return " · ".join(
      html.escape(f"{k} {v:,.1f}{unit}" if isinstance(v, float) else f"{k} {v}{unit}") for k, v in value.items()
    )
  text = html.escape(value if isinstance(value, str) else json.dumps(value))
  return f"<code>{text}</code>" if key in ("command", "workdir", "git") else text
