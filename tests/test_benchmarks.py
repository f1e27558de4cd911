"""The benchmarks run, on sizes that say nothing about speed."""

import json
import runpy

import pytest

from tests import commands
from tests.conftest import ROOT


def run(script, *arguments, out):
  """What the benchmark printed, and the rows of its JSON."""
  done = commands.run(f"benchmarks/{script}", *arguments, f"--json={out}", timeout=600)
  assert done.returncode == 0, done.stderr
  return done, json.loads(out.read_text())["rows"]


def test_the_benchmark_of_experts_runs(tmp_path):
  sizes = ["--tokens=64", "--d_model=16", "--width=32", "--repeats=1"]
  done, rows = run("moe.py", *sizes, out=tmp_path / "moe.json")
  layers = ["dense FFN", "ragged", "ep_allgather", "ep_ragged_a2a", "dense"]
  assert [(row["experts"], row["layer"]) for row in rows] == [(experts, name) for experts in (8, 64) for name in layers]
  measured = [row for row in rows if row["layer"] != "ep_ragged_a2a"]  # XLA has no such collective on CPU
  assert all(row["forward_ratio"] > 0 and row["gradient_ratio"] > 0 for row in measured)
  assert done.stdout.count("cannot run on this platform") == 2
  assert done.stdout.count("ep_allgather") == 2


def test_the_benchmark_of_training_does_the_same_work_on_both_sides(tmp_path):
  """It fails by itself when the first step's loss or gradient norm are not those of transformers."""
  size = "L2,D32,F64,N4,K2,H8,V64,T32,B2"
  done, rows = run("train.py", f"--size={size}", "--experts=4", "--repeats=1", out=tmp_path / "train.json")
  assert [row["model"] for row in rows] == ["dense", "4 experts"] and all(row["size"] == size for row in rows)
  for row in rows:
    speed = row["tokens_per_second"]
    assert row["ratio"] == pytest.approx(speed["ours"] / speed["theirs"])
    assert row["limit_tokens_per_second"] > max(speed.values()) and 4.0 < row["loss"] < 5.0  # ln V is 4.2
  assert done.stdout.count(size) == 2


def test_the_benchmark_of_utilisation_runs_without_an_accelerator_and_says_so(tmp_path):
  arguments = ["--batch_size=2", "--seq_len=16", "--steps=1"]
  done, rows = run("mfu.py", *arguments, out=tmp_path / "mfu.json")
  assert [row["model"] for row in rows] == ["tiny", "tiny_moe"] and "this says nothing of one" in done.stdout
  for row in rows:
    assert row["batch"] == [2, 16] and len(row["kernels"]) == 5 and "just now" in row["peak_source"]
    assert row["mfu"] == pytest.approx(row["flops"]["model"] / row["seconds_per_step"] / row["peak_flops"])
    shares = [kernel["share"] for kernel in row["kernels"]]
    assert 0 < sum(shares) <= 1 and shares == sorted(shares, reverse=True)


def test_a_kernel_is_charged_for_its_own_time_alone():
  def event(name, start, seconds, thread):
    return {"ph": "X", "pid": 1, "tid": thread, "ts": 1e6 * start, "dur": 1e6 * seconds, "name": name}

  def thread(number, name):
    return {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}

  trace = [
    thread(1, "Stream #13"), thread(2, "XLA Modules"), event("module", 0, 9, 2),
    event("while", 0, 5, 1), event("gemm", 1, 2, 1), event("softmax", 3, 1, 1), event("gemm", 6, 3, 1),
  ]  # fmt: skip
  script = runpy.run_path(str(ROOT / "benchmarks" / "mfu.py"), run_name="mfu")
  assert script["kernels"](trace, "gpu") == {"gemm": 5.0, "while": 2.0, "softmax": 1.0}


def test_the_benchmark_of_the_analysis_runs(tmp_path):
  sizes = ["--tokens=16", "--layers=1", "--d_model=128", "--d_ff=64", "--repeats=1"]
  done, rows = run("analysis.py", *sizes, out=tmp_path / "analysis.json")
  rows = {row["what"]: row for row in rows}
  assert rows["plain"]["ratio"] == 1 and rows["sweep of 10 levels"]["forwards"] == 10 and len(rows) == 6
  assert "masked by contribution" in done.stdout


def test_the_benchmark_of_the_report_counts_its_passes(shared_data, tmp_path):
  texts = shared_data / "tinystories" / "valid_v2.jsonl"
  arguments = [f"--model={shared_data / 'stories260k'}", f"--data={texts}", "--tokens=2000", "--seq_len=64"]
  done, (row,) = run("report.py", *arguments, "--batch_size=8", out=tmp_path / "report.json")
  assert 4 < row["masked"] <= 8 and row["forwards"] == pytest.approx(3 + row["masked"] + 1 / row["batches"])
  assert row["ratio"] == pytest.approx(row["report_seconds"] / row["plain_seconds"]) and "target 10" in done.stdout
  assert row["forwards"] < row["estimated"] < 16 and 0.7 < row["zero_fraction"] < 0.8


def compiled(script, *arguments, out):
  """The JSON of a benchmark of the native kernels; skips where there is no compiler for them."""
  done = commands.run(f"benchmarks/{script}", *arguments, f"--json={out}", timeout=600)
  if "cannot be built here" in done.stderr:
    pytest.skip("no C++ compiler")
  assert done.returncode == 0, done.stderr
  return json.loads(out.read_text())


def test_the_benchmark_of_decoding_runs_and_its_modes_agree(tmp_path):
  sizes = ["--shapes=tiny,tiny_moe", "--layers=2", "--tokens=5", "--nopeers", f"--plot={tmp_path / 'decode.png'}"]
  fields = compiled("decode.py", *sizes, out=tmp_path / "decode.json")
  assert fields.keys() >= {"speedup_over_dense", "ideal", "bandwidth_share", "peers"}
  assert fields["ideal"].keys() == fields["speedup_over_dense"].keys() == {"exact", "predictor"}
  assert fields["ideal"]["predictor"] > 1 and (tmp_path / "decode.png").stat().st_size > 10_000
  assert [result["shape"] for result in fields["results"]] == ["tiny", "tiny_moe"]


def test_the_break_even_of_skipping_is_measured(tmp_path):
  rows = compiled("break_even.py", "--preset=tiny", "--repeats=1", out=tmp_path / "rows.json")["rows"]
  assert len(rows) == 72 and all(row["ratio"] > 0 for row in rows)
  assert rows[0]["bytes"] == rows[36]["bytes"] == 1 and rows[-4]["bytes"] < 0.2
  assert all(abs(row["measured_zeros"] - row["zeros"]) < 0.15 for row in rows)


def test_the_benchmark_of_data_runs_and_says_which_peers_are_missing(tmp_path):
  sentencepiece = pytest.importorskip("sentencepiece")
  texts = tmp_path / "texts"
  texts.mkdir()
  lines = [f"{i} bottles of beer on the wall, {i} bottles of beer" for i in range(100)]
  (texts / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_prefix=f"{tmp_path}/small", vocab_size=36, minloglevel=2
  )
  sizes = [f"--files={texts}", f"--vocabulary={tmp_path}/small.model", "--repeats=1", "--seq_len=64", "--processes=1"]
  done, rows = run("data.py", *sizes, out=tmp_path / "data.json")
  assert [row["reader"] for row in rows] == ["tsparse", "datasets", "grain"] and rows[0]["ratio"] == 1
  missing = [row for row in rows if not row["installed"]]
  assert done.stdout.count("not installed: requirements-bench.txt") == len(missing)
  tokens = [row["tokens"] for row in rows if row["installed"]]
  assert min(tokens) > 0.8 * max(tokens) > 800  # the same text; the peers drop or pad its end


def test_the_benchmark_of_checksums_runs(tmp_path):
  sizes = ["--gigabytes=0.003", "--file_megabytes=2", "--repeats=1"]
  done, rows = run("checksums.py", *sizes, out=tmp_path / "checksums.json")
  assert "0.003 GB in 2 files" in done.stdout and all(row["seconds"] > 0 for row in rows)
  assert [row["what"] for row in rows] == ["read", "take", "compare"] * 2
