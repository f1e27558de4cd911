"""The report as one HTML page that opens anywhere: no other file, no network. page.js draws the charts in it."""

import html
import json
import re
from pathlib import Path
from string import Template

from tsparse.analysis import tables
from tsparse.analysis.charts import Chart
from tsparse.analysis.plots import COLOURS
from tsparse.analysis.tables import Table

FOLDER = Path(__file__).parent
# Title of a section -> keys of its tables and charts, in order; what the analysis has no numbers for is not there.
SECTIONS = {
  "Quality": ("quality", "gap", "frontier", "confidence", "intervals", "comparisons"),
  "The recipe": ("training",),
  "What zeros cost": (
    "perplexity_vs_sparsity", "masked_hidden", "masked_gate", "masked_up", "masked_contribution", "threshold_methods",
    "methods", "ppl_p",
  ),
  "Where the zeros are": ("zeros_per_layer", "zeros_per_position", "histograms", "expert_load", "experts"),
  "Each expert": ("expert_curves", "experts_masked", "expert_thresholds"),
  "Hot and cold neurons": ("neuron_cdf", "neurons", "neurons_between", "neuron_frequency"),
  "Beyond one token": ("union_zeros", "union_speedup", "union_batch", "union_window"),
  "Parameters and operations": ("accounting",),
  "Beside the paper": ("paper_1", "paper_2", "paper_3"),
  "The data": ("by_source", "drawn"),
  "The models": ("models",),
}  # fmt: skip


def page(analysis: dict, run: dict, charts: list[Chart]) -> str:
  """The page of an analysis and its run, both as strict JSON, with these charts."""
  definitions = {key: str(value) for key, value in (analysis.get("definitions") or {}).items()}
  for m in analysis["models"]:
    definitions.setdefault("activated", str((m.get("parameters") or {}).get("definition") or ""))
  found = {
    table.key: (table, _table(table)) for table in [*tables.tables(analysis), tables.details(analysis["models"])]
  }
  found |= {chart.key: (chart, _chart(chart)) for chart in charts}
  notes = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in tables.notes(analysis))
  used, sections = set(), []
  for title, keys in SECTIONS.items():
    parts = [found[key] for key in keys if found.get(key)]
    terms = {term: definitions[term] for part, _ in parts for term in part.terms if definitions.get(term)}
    used |= set(terms)
    if parts:
      first, *rest = (text for _, text in parts)
      first += notes if title == "Quality" else ""
      body = "\n".join([first, _definitions(terms, title == "Quality"), *rest])
      sections.append(f"<section>\n<h2>{title}</h2>\n{body}\n</section>")
  others = {term: text for term, text in definitions.items() if term not in used and text}
  if others:
    sections.append(f"<section>\n<h2>Other definitions</h2>\n{_definitions(others, False)}\n</section>")
  names = [m["name"] for m in analysis["models"]]
  return Template((FOLDER / "page.html").read_text()).substitute(
    title=html.escape(str(run.get("config") or (", ".join(names) if len(names) < 7 else f"{len(names)} models"))),
    sections="\n".join(sections),
    facts=_list({key: _fact(key, value) for key, value in run.items() if value is not None}),
    data=_json({
      "models": names,
      "colours": COLOURS,
      "charts": {chart.key: _plain(chart) for chart in charts},
    }),
    script=(FOLDER / "page.js").read_text(),
  )  # fmt: skip


def _chart(chart: Chart) -> str:
  """Where page.js puts the chart. Without scripts it says where the picture is."""
  return (
    f'<figure class="chart" data-chart="{chart.key}"><h3>{html.escape(chart.title)}</h3>'
    f"<noscript>Drawn by a script; the same is in {chart.key}.png and csv/{chart.key}.csv.</noscript></figure>"
  )


def _plain(chart: Chart) -> dict:
  views = []
  for view in chart.views:
    data = view.data if chart.kind == "heat" else [item._asdict() for item in view.data]
    views.append({"name": view.name, "x": view.x._asdict(), "y": view.y._asdict(), "data": data, "shares": view.shares})
  return {"title": chart.title, "kind": chart.kind, "views": views}


def _json(value) -> str:
  """JSON inside <script>: numbers with 6 digits, and nothing that could end the element."""

  def short(x):
    if isinstance(x, dict):
      return {key: short(y) for key, y in x.items()}
    if isinstance(x, (list, tuple)):
      return [short(y) for y in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x

  return (
    json.dumps(short(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("/", "\\u002f")
  )


def _table(table: Table) -> str:
  def cell(tag, i, text, again=False):
    scope = ' scope="row"' if tag == "th" else ""
    kind = " class=again" if again else "" if i < table.labels else " class=number"
    return f"<{tag}{scope}{kind}>{html.escape(text)}</{tag}>"

  head, body, name = "".join(cell("th", i, c).replace('"row"', '"col"') for i, c in enumerate(table.columns)), "", None
  for first, *rest in table.shown:  # the rows of a model follow each other: its name is prominent once
    cells = "".join(cell("td", i, c) for i, c in enumerate(rest, 1))
    body += f"<tr>{cell('th', 0, first, first == name)}{cells}</tr>\n"
    name = first
  grid = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
  notes = "".join(f'\n<p class="note">{html.escape(note)}</p>' for note in table.notes)
  return f'<h3>{html.escape(table.title)}</h3>\n<div class="wide">{grid}</div>{notes}'


def _definitions(terms: dict[str, str], unfolded: bool) -> str:
  if not terms:
    return ""
  named = {term.replace("_", " "): _formatted(text) for term, text in terms.items()}
  summary = html.escape("What it means: " + ", ".join(named))
  return f"<details{' open' if unfolded else ''}><summary>{summary}</summary>\n<dl>\n{_list(named)}\n</dl></details>\n"


def _formatted(text: str) -> str:
  """Markup for `code` in a definition."""
  return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _list(items: dict) -> str:
  return "\n".join(f"<dt>{html.escape(key)}</dt><dd>{value}</dd>" for key, value in items.items())


def _fact(key, value) -> str:
  if isinstance(value, dict):
    unit = " s" if key == "seconds" else ""
    return " · ".join(
      html.escape(f"{k} {v:,.1f}{unit}" if isinstance(v, float) else f"{k} {v}{unit}") for k, v in value.items()
    )
  text = html.escape(value if isinstance(value, str) else json.dumps(value))
  return f"<code>{text}</code>" if key in ("command", "workdir", "git") else text
