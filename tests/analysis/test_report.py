import csv
import functools
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from tsparse import files
from tsparse.analysis import charts, page, plots, report, tables
from tsparse.analysis.analyze import DEFINITIONS

RUN = {
  "config": "tiny <relufy>",
  "workdir": "runs/tiny_relufy",
  "command": "python experiments/run.py --config=configs/tiny_relufy.py --workdir=runs/tiny_relufy",
  "seconds": {"base": 100.0, "train": 120.0, "analysis": 20.0},
  "versions": {"jax": "0.7.2", "flax": "0.12.0"},
  "git": "abc123",
  "device": "2-core CPU",
}


def model(name, activation, perplexity, zeros, levels, experts=1, trained_tokens=2_048_000):
  curve = [{"sparsity": s, "loss": 1.0, "perplexity": perplexity * (1 + (max(0, s - zeros)) ** 2)} for s in levels]
  per_expert = [[zeros * (1 - e / 20) for e in range(experts)]] * 4
  return {
    "name": name, "model": f"runs/tiny_relufy/{name}", "activation": activation, "data": "stdlib (validation)",
    "tokens": 51_200, "documents": 40, "loss": 1.5, "perplexity": perplexity, "trained_tokens": trained_tokens,
    "zero_fraction": {"mean": zeros, "per_layer": [zeros] * 4, "per_expert": per_expert},
    "dead_neurons": {"count": 3, "total": 2048, "per_layer": [0, 1, 2, 0]},
    "curve": curve,
    "parameters": {"total": 1_050_000, "activated": 410_000, "definition": "parameters a token's forward pass uses"},
  }  # fmt: skip


def full(name, activation, perplexity, zeros, experts=1):
  """An entry with everything that an analysis can have."""
  levels, layers, width = (0.0, 0.5, 0.8, 0.85, 0.9), 4, 0.0 if activation == "drelu" else 4.0
  m = model(name, activation, perplexity, zeros, levels, experts)

  def cost(sparsity):
    lost = max(0.0, sparsity - zeros) ** 2 * (1 + width)
    return {"sparsity": sparsity, "loss": math.log(perplexity) + lost, "perplexity": perplexity * math.exp(lost)}

  thresholds = {"epsilon_per_expert": [[0.1 * (e + 1) for e in range(experts)]] * layers} if experts > 1 else {}
  edges = np.linspace(-4, 4, 82)
  middles = (edges[1:] + edges[:-1]) / 2
  widths = {"gate": 1.5, "up": 1.0, "hidden": 0.3}
  bins = {key: np.exp(-(middles**2) / (2 * s**2)) / (s * 25) for key, s in widths.items()}
  sizes = {"batch": (1, 2, 4, 8, 16, 32, 64, 128), "window": (1, 2, 4, 8, 16)}
  share = np.linspace(0, 1, 101)
  return m | {
    "vocabulary": "bytes", "training_loss": 1.625,
    "curve": [cost(s) for s in levels],
    "curves": [
      {"selection": key, "points": [cost(min(0.99, s * f)) | {"sparsity": s} for s in levels]}
      for key, f in (("hidden", 1), ("gate", 1.08), ("contribution", 0.97))
    ],
    "zero_fraction": m["zero_fraction"] | {"per_position": (zeros - 0.2 / (5 + np.arange(256))).clip(0).tolist()},
    "confidence": {
      "loss": [1.45, 1.56], "perplexity": [perplexity * 0.95, perplexity * 1.06],
      "zero_fraction": [zeros - 0.004, zeros + 0.003], "level": 0.95, "resamples": 2000,
    },
    "parameters": m["parameters"] | {
      "accounts": [{"name": f"account {i}", "total": 1e6 - 1e5 * i, "activated": 4e5 - 1e5 * i} for i in (0, 1, 2)],
    },
    "flops": {"total": 2.1e6, "activated": 0.8e6, "seq_len": 128},
    "histograms": {"edges": edges.tolist(), **{key: [b.tolist()] * layers for key, b in bins.items()}},
    "thresholds": {
      "fat": [{"epsilon": e, **cost(s)} for e, s in ((0.01, 0.5), (0.05, 0.8), (0.1, 0.9))],
      "cett": [{"cett": c, **cost(s), "epsilon_per_layer": [0.1] * layers} for c, s in ((0.05, 0.4), (0.2, 0.7))],
      "ppl_p": [{"p": 1, "sparsity": 0.55, "cett": 0.12}],
      "cats": [{"target": t, **cost(t)} for t in (0.5, 0.8, 0.9)],
      "teal": [{"target": t, **cost(t * 0.98), **thresholds} for t in (0.5, 0.8, 0.9)],
    },
    "neurons": {
      "cdf": {"share_of_neurons": share.tolist(), "share_of_activations": (1 - (1 - share) ** (2 + zeros)).tolist()},
      "hot_share_80": {"per_layer": [0.3] * layers, "mean": 0.3},
      "frequency": {"edges": np.linspace(0, 1, 5).tolist(), "per_layer": [[0.1, 0.2, 0.3, 0.4]] * layers},
      "between": [
        {"texts": ["web", "code"], "hot_overlap": {"mean": 0.75}, "rank_correlation": {"mean": 0.5}}
      ],
      "stability": {"hot_overlap": {"mean": 0.92, "per_layer": [0.92] * layers}},
      "coactivation": {},
    },
    "union": {
      key: [{"size": n, "zero_fraction": zeros**n, "expected_speedup": 1 / (1 - zeros**n)} for n in found]
      for key, found in sizes.items()
    },
    "experts": {
      "load": np.random.default_rng(0).dirichlet([3] * experts, layers).tolist(), "entropy": [1.9] * layers,
      "joint": {"routed": 0.25, "active_in_routed": 0.15, "active_of_all": 0.041, "paper": 0.0375},
      "per_expert_zero_fraction": [[zeros * (1 - e / 20) for e in range(experts - 1)] + [float("nan")]] * layers,
      "curves": {
        "levels": [0.5, 0.9],
        "error": [[[0.01 * i, 0.1 + 0.1 * e] for e in range(experts - 1)] + [[math.nan] * 2] for i in range(layers)],
        "perplexity": [[[28.0, 28.5 + i + e] for e in range(experts)] for i in range(layers)],
      },
    } if experts > 1 else None,
  }  # fmt: skip


def analysis(*models):
  return {"models": list(models), "definitions": {"sparsity": "share of hidden entries set to zero per token & layer"}}


LEVELS = (0.0, 0.5, 0.9)
MIXTURE = analysis(
  *(
    model(name, "drelu", 7.25, 0.6, ())
    | {"sources": [{"name": s, "loss": 1.25, "zero_fraction": 0.5} for s in held_out]}
    for name, held_out in (("base", ["web", "code"]), ("swapped", ["web"]))
  )
) | {
  "sources": [
    {"name": n, "category": "c", "tokens": 1500, "share": w, "target": w, "epochs": e, "skipped": 3, "malformed": m}
    for n, w, e, m in (("web", 0.75, 1.5, 0), ("code", 0.25, None, 2))
  ]
}
CASES = {
  "mixture": MIXTURE,
  "relufy": analysis(
    model("base", "swiglu", 4.4816, 0.0, LEVELS),
    model("swapped", "drelu", 13359.7, 0.4812, ()),
    model("recovered", "drelu", 3.9937, 0.7531, LEVELS, trained_tokens=4_096_000),
  ),
  "single": analysis(model("trained", "relu", 7.25, 0.6, LEVELS)),
  "moe": analysis(model("trained", "drelu", 7.25, 0.6, LEVELS, experts=8)),
  "many": analysis(*(model(f"runs/turbosparse_{i}", "drelu", 7.25, 0.6, LEVELS, trained_tokens=i) for i in range(5))),
  "full": analysis(full("swiglu", "swiglu", 28.48, 0.02), full("drelu", "drelu", 28.45, 0.85, experts=8))
  | {
    "paper": True,
    "comparisons": [{"models": ["swiglu", "drelu"], "difference": -0.02, "interval": [-0.03, -0.01]}],
    "definitions": {**DEFINITIONS, "histograms": "share of the entries in each bin"},
  },
  "broken": analysis(model("trained", "drelu", float("inf"), float("nan"), LEVELS)),
}


def test_a_mixture_has_its_sources_in_two_tables():
  loss, drawn = report.tables(MIXTURE)[-2:]
  assert loss.columns == ["source", "base loss", "base zeros", "swapped loss", "swapped zeros"]
  assert loss.rows == [["web", "1.250", "50.0%", "1.250", "50.0%"], ["code", "1.250", "50.0%", "", ""]]
  assert drawn.rows[0] == ["web", "c", "1.50K", "75.00%", "75.00%", "1.50", "3"]
  assert drawn.rows[1] == ["code", "c", "1.50K", "25.00%", "25.00%", "unknown", "3 and 2 malformed"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A function of the name of a case: the folder of its report, written once."""
  return functools.cache(lambda case: report.write_report(CASES[case], RUN, tmp_path_factory.mktemp(case)).parent)


def printed(analysis):
  console = Console(file=io.StringIO(), width=80)
  report.print_table(analysis, console)
  return console.file.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_terminal_page_and_summary_show_the_same_cells(case, written):
  page, summary = ((written(case) / name).read_text() for name in ("report.html", "summary.json"))
  text = printed(CASES[case])
  assert max(map(len, text.splitlines())) <= 80
  assert "…" not in text
  for table in report.tables(CASES[case]):
    for cell in sum(table.shown, []):
      assert cell in text
      assert f">{cell}<" in page
      assert json.dumps(cell, ensure_ascii=False) in summary
  assert report.tables(json.loads((written(case) / "analysis.json").read_text())) == report.tables(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_files_are_strict_and_the_page_stands_alone(case, written):
  def refuse(constant):
    raise AssertionError(constant)

  folder = written(case)
  page = (folder / "report.html").read_text()
  drawn = [chart.key for chart in charts.charts(files.strict(CASES[case]))]
  assert {path.name for path in folder.glob("*.png")} == {f"{key}.png" for key in drawn}
  assert {path.name for path in (folder / "csv").iterdir()} == {
    *(f"{key}.csv" for key in drawn), *(f"table_{table.key}.csv" for table in report.tables(CASES[case])),
  }  # fmt: skip
  for name in ("analysis.json", "summary.json"):
    json.loads((folder / name).read_text(), parse_constant=refuse)
  assert not re.search(r"https?:|//|@import|<link|<script src|url\(|(src|href)=\"", page)
  assert page.count('class="chart"') == len(drawn) == page.count("<noscript>")
  assert page.count("<script") == page.count("</script") == 2  # the data cannot end its element
  assert "tiny &lt;relufy&gt;" in page
  assert RUN["command"] in page


def rows_of(path):
  with path.open() as lines:
    return list(csv.DictReader(lines))


def test_everything_an_analysis_can_have_is_shown(written):
  page = (written("full") / "report.html").read_text()
  assert {chart.key for chart in charts.charts(files.strict(CASES["full"]))} == {
    "intervals", "perplexity_vs_sparsity", "threshold_methods", "zeros_per_layer", "zeros_per_position", "histograms",
    "expert_load", "expert_curves", "expert_thresholds", "neuron_cdf", "neuron_frequency", "union_zeros",
    "union_speedup",
  }  # fmt: skip
  shown = {table.key: table for table in report.tables(CASES["full"])}
  assert set(shown) == {
    "quality", "masked_hidden", "masked_gate", "masked_contribution", "confidence", "comparisons", "methods", "ppl_p",
    "experts", "experts_masked", "neurons", "neurons_between", "union_batch", "union_window", "accounting", "paper_1",
    "paper_2", "paper_3",
  }  # fmt: skip
  assert all(f"<h3>{table.title}" in page.replace("&#x27;", "'") for table in shown.values())
  # one table: SwiGLU by CATS at 50 %, and dReLU by top-k at 90 %
  rows = {(row[0], row[1], row[2]): row[3:] for row in shown["methods"].rows}
  assert rows["swiglu (swiglu)", "CATS", "target 50%"][0] == "50.0%"
  assert rows["drelu (drelu)", "top-k", "90%"] == ["90.0%", "28.52", "+0.3%"]
  assert shown["experts_masked"].rows == [
    ["drelu", "50%", "1.5%", "0.0%", "3.0%", "3.6", "28.00", "28.00", "28.00", "3.7"],
    ["drelu", "90%", "40.0%", "10.0%", "70.0%", "3.6", "33.50", "28.50", "38.50", "3.7"],
  ]
  assert shown["neurons_between"].rows[1] == ["drelu", "web and code", "75.0%", "0.500"]
  assert shown["comparisons"].rows == [["drelu - swiglu", "-0.0200", "-0.0300 to -0.0100", "drelu"]]
  drelu, swiglu = (row for row in shown["paper_3"].rows if "paper" in row[1])
  assert drelu[2:] == ["28.45", "28.45", "28.45", "28.65", "29.19"] and swiglu[-1] == "112.36"
  assert [row[2:] for row in shown["paper_2"].rows][2:] == [["1.625", "1.500", "28.48"], ["1.625", "1.500", "28.45"]]
  assert "Not a reproduction" in page and "1.05M parameters, 2.05M tokens seen" in page
  for term, text in CASES["full"]["definitions"].items():
    assert f"<dt>{term.replace('_', ' ')}</dt>" in page, text


def test_csv_files_hold_the_numbers_of_the_analysis(written):
  folder = written("full") / "csv"
  gate = [r for r in rows_of(folder / "perplexity_vs_sparsity.csv") if (r["model"], r["series"]) == ("drelu", "gate")]
  points = CASES["full"]["models"][1]["curves"][1]["points"]
  assert [(float(r["x"]), float(r["y"])) for r in gate] == [(p["sparsity"], p["perplexity"]) for p in points]
  load = [r for r in rows_of(folder / "expert_load.csv") if r["view"] == "drelu: share of the tokens"]
  assert [float(r["value"]) for r in load] == np.ravel(CASES["full"]["models"][1]["experts"]["load"]).tolist()
  curves = [r for r in rows_of(folder / "expert_curves.csv") if r["view"] == "drelu: error, layer 2"]
  assert [(r["series"], float(r["x"]), float(r["y"])) for r in curves if r["series"] == "expert 3"] == [
    ("expert 3", 0.5, 0.02), ("expert 3", 0.9, 0.4)
  ]  # fmt: skip
  assert len(curves) == 2 * (7 + 1)  # an expert that no token reached has no curve; the mean has
  low = [(r["model"], float(r["low"])) for r in rows_of(folder / "intervals.csv") if r["view"] == "loss"]
  assert low == [("swiglu", 1.45), ("drelu", 1.45)]


def opened(path, profile, *options):
  """What a browser makes of a page, as text."""
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  if not browser:
    pytest.skip("no chromium to open the page with")
  options = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    *options,
  ]
  options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--dump-dom"]
  done = subprocess.run([browser, *options, f"file:///{path}"], capture_output=True, text=True, timeout=60)
  assert "CONSOLE" not in done.stderr and "Uncaught" not in done.stderr, done.stderr
  return done.stdout


@pytest.mark.parametrize("case", ["full", "broken"])
def test_the_page_draws_every_chart_without_an_error(case, written, tmp_path):
  figures = opened(written(case) / "report.html", tmp_path / "profile").split('class="chart"')[1:]
  assert len(figures) == len(charts.charts(files.strict(CASES[case])))
  assert all('role="img"' in figure and "NaN" not in figure.partition("</figure>")[0] for figure in figures)


# Presses the controls as a hand would and notes what the page then shows.
HAND = """
const seen = {}, root = document.documentElement;
const figure = (key) => document.querySelector(`[data-chart=${key}]`);
const press = (f, name) => [...f.querySelectorAll("button")].find((b) => b.textContent === name).click();
const lines = (f) => f.querySelectorAll("svg[role=img] path").length;
const ticks = (f) => [...f.querySelectorAll("svg[role=img] text")].map((t) => t.textContent);
const masked = figure("perplexity_vs_sparsity"), error = figure("expert_curves");
seen.wide = root.scrollWidth - root.clientWidth;
seen.lines = [lines(masked)];
press(masked, "swiglu"); seen.lines.push(lines(masked));
press(masked, "gate"); seen.lines.push(lines(masked));
press(masked, "swiglu"); press(masked, "gate"); seen.lines.push(lines(masked));
seen.log = [ticks(masked)]; press(masked, "log scale"); seen.log.push(ticks(masked));
const select = error.querySelector("select");
seen.views = select.options.length; seen.first = ticks(error);
select.value = 5; select.onchange(); seen.sixth = ticks(error); seen.experts = lines(error);
press(error, "each expert"); seen.mean = lines(error);
const box = error.querySelector("svg[role=img]").getBoundingClientRect();
const circle = error.querySelector("svg[role=img] circle:not(.hit)");
const at = { clientX: box.left + +circle.getAttribute("cx"), clientY: box.top + +circle.getAttribute("cy") };
error.querySelector("svg[role=img]").parentElement.dispatchEvent(new PointerEvent("pointermove", at));
seen.tip = error.querySelector(".tip").hidden ? "" : error.querySelector(".tip").textContent;
const shade = () => [getComputedStyle(root).colorScheme, getComputedStyle(document.body).backgroundColor];
seen.themes = [shade()];
for (let i = 0; i < 2; i++) { press(document.querySelector("header"), seen.themes.at(-1)[0] === "dark" ? "light" : "dark"); seen.themes.push(shade()); }
document.body.innerHTML = "<pre id=seen></pre>"; document.getElementById("seen").textContent = JSON.stringify(seen);
"""  # noqa: E501


@pytest.mark.parametrize("system", ["light", "dark"])
def test_the_controls_of_the_page_do_what_they_say(system, written, tmp_path):
  page = (written("full") / "report.html").read_text().replace("</body>", f"<script>{HAND}</script></body>")
  (tmp_path / "page.html").write_text(page)
  scheme = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(system)}"
  found = opened(tmp_path / "page.html", tmp_path / "profile", "--window-size=390,800", scheme)
  seen = json.loads(html.unescape(found.partition('<pre id="seen">')[2].partition("</pre>")[0]))
  assert seen["wide"] == 0  # nothing sticks out of a phone
  assert seen["lines"] == [6, 3, 2, 6]  # three selections of two models
  assert "1,000" in seen["log"][0] and "50" in seen["log"][0] and "0" in seen["log"][1]
  assert seen["views"] == 8 and "error of the expert's output" in seen["first"] and "perplexity" in seen["sixth"]
  assert (seen["experts"], seen["mean"]) == (9, 1)
  assert seen["tip"].startswith("drelu · mean") and "50%" in seen["tip"] and "28" in seen["tip"]
  colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}
  order = [system, "light" if system == "dark" else "dark", system]
  assert seen["themes"] == [[theme, colours[theme]] for theme in order]


def test_summary_carries_numbers_and_the_run(tmp_path):
  report.write_report(CASES["relufy"], RUN, tmp_path)
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert RUN.items() <= summary.items()
  recovered = summary["models"][2]
  assert recovered["zero_fraction"] == 0.7531
  assert recovered["trained_tokens"] == 4_096_000
  assert (recovered["activated_parameters"], recovered["total_parameters"]) == (410_000, 1_050_000)


def test_masked_table_compares_with_the_unmasked_model():
  _, masked = report.tables(CASES["relufy"])
  assert masked.columns == ["sparsity", "base", "change", "recovered", "change"]  # swapped was not masked
  assert masked.rows == [
    ["0%", "4.48", "", "3.99", ""],
    ["50%", "5.60", "+25.0%", "3.99", "+0.0%"],
    ["90%", "8.11", "+81.0%", "4.08", "+2.2%"],
  ]
  assert masked.shown[0] == ["0%", "4.48", "–", "3.99", "–"]
  printed = Console(file=io.StringIO(), width=100)
  report.print_tables([masked], printed)
  assert printed.file.getvalue().count("–") == 2 and page._table(masked).count(">–</td>") == 2


def test_unequal_training_is_said():
  assert any("plain further training" in note for note in report.notes(CASES["relufy"]))
  assert not any("plain further training" in note for note in report.notes(CASES["moe"]))


def test_import_is_light():
  code = "import sys, tsparse.analysis.report; sys.exit(bool({'matplotlib', 'rich'} & set(sys.modules)))"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_union_in_which_nothing_fires_is_shown_too():
  points = [{"size": 1, "zero_fraction": 1.0, "expected_speedup": None}]
  (table,) = tables.unions([{"name": "dead", "union": {"batch": points}}])
  assert table.rows == [["1", "100.0%", "∞"]]
  assert not any(view.data for view in charts.union_speedup([{"name": "dead", "union": {"batch": points}}]).views)


@pytest.mark.parametrize(("kind", "points"), [("lines", [[0, 0.5], [1, 1.0]]), ("points", [[0.8, 0.5]])])
def test_the_names_of_many_models_neither_touch_nor_leave_their_picture(kind, points):
  from matplotlib.text import Text

  names = [f"model_{i}" for i in range(30 if kind == "lines" else 8)]
  series = [charts.Series(name, points) for name in names]
  view = charts.View("", charts.Axis("x"), charts.Axis("y", limits=(0, 1)), series)
  figure = plots.draw(charts.Chart("key", "title", kind, [view], ()), names)
  figure.draw_without_rendering()
  boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
  assert len(boxes) == len(names)
  assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
  assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
