import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from tsparse.analysis import report

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
  "broken": analysis(model("trained", "drelu", float("inf"), float("nan"), LEVELS)),
}


def test_a_mixture_has_its_sources_in_two_tables():
  loss, drawn = report.tables(MIXTURE)[-2:]
  assert loss.columns == ["source", "base loss", "base zeros", "swapped loss", "swapped zeros"]
  assert loss.rows == [["web", "1.250", "50.0%", "1.250", "50.0%"], ["code", "1.250", "50.0%", "", ""]]
  assert drawn.rows[0] == ["web", "c", "1.50K", "75.00%", "75.00%", "1.50", "3"]
  assert drawn.rows[1] == ["code", "c", "1.50K", "25.00%", "25.00%", "unknown", "3 and 2 malformed"]


def printed(analysis):
  console = Console(file=io.StringIO(), width=80)
  report.print_table(analysis, console)
  return console.file.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_terminal_page_and_summary_show_the_same_cells(case, tmp_path):
  page = report.write_report(CASES[case], RUN, tmp_path).read_text()
  text, summary = printed(CASES[case]), (tmp_path / "summary.json").read_text()
  assert max(map(len, text.splitlines())) <= 80
  assert "…" not in text
  for table in report.tables(CASES[case]):
    for cell in sum(table.rows, []):
      assert cell in text
      assert f">{cell}<" in page
      assert json.dumps(cell, ensure_ascii=False) in summary
  assert report.tables(json.loads((tmp_path / "analysis.json").read_text())) == report.tables(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_files_are_strict_and_the_page_stands_alone(case, tmp_path):
  def refuse(constant):
    raise AssertionError(constant)

  page = report.write_report(CASES[case], RUN, tmp_path).read_text()
  names = {"analysis.json", "summary.json", "perplexity_vs_sparsity.png", "zeros_per_layer.png", "report.html"}
  assert {path.name for path in tmp_path.iterdir()} == names
  for name in ("analysis.json", "summary.json"):
    json.loads((tmp_path / name).read_text(), parse_constant=refuse)
  assert not re.search(r"https?:|//|@import|<link|<script|url\((?!#)|(src|href)=\"(?!#)", page)
  assert page.count("<svg") == 2
  assert "tiny &lt;relufy&gt;" in page
  assert RUN["command"] in page


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


def test_unequal_training_is_said():
  assert any("plain further training" in note for note in report.notes(CASES["relufy"]))
  assert not any("plain further training" in note for note in report.notes(CASES["moe"]))


def test_import_is_light():
  code = "import sys, tsparse.analysis.report; sys.exit(bool({'matplotlib', 'rich'} & set(sys.modules)))"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
