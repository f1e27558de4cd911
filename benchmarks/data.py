"""Tokens per second from files to rows: ours against `datasets` and Grain doing the same work.

python benchmarks/data.py --files=texts/ --vocabulary=tokenizer.model
python benchmarks/data.py --files=texts/ --vocabulary=tokenizer.model --demo=100 --json=data.json

Every reader opens the same .jsonl files, encodes every document with the same SentencePiece model, ends it with EOS and
cuts the whole into rows of --seq_len tokens. Each is a process of its own, pinned to the same cores, in turns; time is
from the files to the last row, imports left out. CPU seconds, of all its processes, are what a loaded machine cannot
spoil. Ours and Grain also make segment ids and positions, and shuffle; `datasets` makes tokens only.
The peers are in requirements-bench.txt. Figures: benchmarks/README.md.
"""

import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files
from tsparse.errors import RunFailure, UserError

FILES = flags.DEFINE_string("files", None, "A folder of .jsonl files with a text field.")
VOCABULARY = flags.DEFINE_string("vocabulary", None, "A SentencePiece model.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "Tokens of a row.")
PROCESSES = flags.DEFINE_integer("processes", 2, "Cores, and worker processes of the peers.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Times each is run, in turns; the least counts.")
DEMO = flags.DEFINE_integer("demo", 0, "Steps of configs/tiny_drelu.py, for the share of step time spent waiting.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
READER = flags.DEFINE_string("reader", "", "Runs this reader in this process; used by the benchmark itself.")
TARGET = 0.02  # of step time


def ours(paths: list[str], scratch: Path) -> int:
  """An epoch by the training iterator, one thread; like the others it returns the tokens of its rows."""
  del paths
  from tsparse.data import train_iterator
  from tsparse.data.settings import DataSettings

  (scratch / "held_out.jsonl").write_text('{"text": "so that all of the files is trained on"}\n')
  data = DataSettings(train=FILES.value, validation=f"{scratch}/held_out.jsonl", vocabulary=VOCABULARY.value)
  batches = train_iterator(data, seq_len=SEQ_LEN.value, batch_size=data.lanes, seed=0)
  tokens, documents, taken = 0, 1, 0
  while taken < documents:
    tokens += int((next(batches)["segment_ids"] > 0).sum())
    tally = json.loads(batches.tally())
    documents, taken = tally["sources"][0]["documents"], sum(lane["taken"][0] for lane in tally["lanes"].values())
  return tokens


def hugging_face(paths: list[str], scratch: Path) -> int:
  """`datasets`: tokenised, then concatenated and cut a thousand documents at a time, as in transformers' run_clm."""
  import datasets

  datasets.disable_progress_bars()
  size, processes = SEQ_LEN.value, PROCESSES.value

  def tokens(batch):
    model = _model(VOCABULARY.value)
    return {"ids": [ids + [model.eos_id()] for ids in model.encode(batch["text"], num_threads=1)]}

  def rows(batch):
    flat = [i for ids in batch["ids"] for i in ids]
    return {"ids": [flat[i : i + size] for i in range(0, len(flat) - size + 1, size)]}

  texts = datasets.load_dataset("json", data_files=paths, split="train", cache_dir=str(scratch))
  encoded = texts.map(tokens, batched=True, num_proc=processes, remove_columns=texts.column_names)
  packed = encoded.map(rows, batched=True, num_proc=processes).with_format("numpy")
  return sum(len(row["ids"]) for row in packed)


class Lines:
  """The texts of .jsonl files by number, for Grain: their places are found in one pass, as ours are."""

  def __init__(self, paths: list[str]):
    self._places = []
    for path in paths:
      with open(path, "rb") as f:
        offset = 0
        for line in f:
          self._places.append((path, offset, len(line)))
          offset += len(line)

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, number: int) -> str:
    path, offset, length = self._places[number]
    with open(path, "rb") as f:
      f.seek(offset)
      return json.loads(f.read(length))["text"]


def grain(paths: list[str], scratch: Path) -> int:
  """Grain: worker processes read in a shuffled order, tokenise, concatenate and cut."""
  del scratch
  import grain as library
  import numpy as np

  vocabulary = VOCABULARY.value

  def encode(text):
    model = _model(vocabulary)
    return {"targets": np.array([*model.encode(text), model.eos_id()], np.int32)}

  documents = library.MapDataset.source(Lines(paths)).shuffle(seed=0).map(encode).to_iter_dataset()
  rows = library.experimental.ConcatThenSplitIterDataset(documents, length_struct={"targets": SEQ_LEN.value})
  rows = rows.mp_prefetch(library.MultiprocessingOptions(num_workers=PROCESSES.value))
  return sum(int((row["targets_segment_ids"] > 0).sum()) for row in rows)


@functools.cache
def _model(path: str):
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_file=path)


READERS = {"tsparse": ours, "datasets": hugging_face, "grain": grain}


def read_here(name: str):
  """Runs a reader in this process and prints its tokens, seconds and the CPU seconds before it began."""
  paths = sorted(str(path) for path in Path(FILES.value).glob("**/*.jsonl"))
  if name != "tsparse":
    importlib.import_module(name)
  _model(VOCABULARY.value)
  with tempfile.TemporaryDirectory() as scratch:
    before, start = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.perf_counter()
    tokens = READERS[name](paths, Path(scratch))
    print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - start, "before": before}))


def measure(name: str) -> dict[str, float]:
  """Tokens, seconds and CPU seconds of a reader in a process of its own, with the workers it starts."""
  arguments = [f"--{flag.name}={flag.value}" for flag in (FILES, VOCABULARY, SEQ_LEN, PROCESSES)]
  command = [sys.executable, __file__, *arguments, f"--reader={name}"]
  with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
    process = subprocess.Popen(command, stdout=said, stderr=errors, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said.seek(0), errors.seek(0)
    if process.returncode:
      raise RunFailure(f"the reader {name} failed: {errors.read().strip().splitlines()[-1]}")
    row = json.loads(said.read().splitlines()[-1])
  return {"tokens": row["tokens"], "seconds": row["seconds"], "cpu": usage.ru_utime + usage.ru_stime - row["before"]}


def waiting(steps: int) -> float:
  """Mean share of step time that a short run of the demo spends waiting for data."""
  with tempfile.TemporaryDirectory() as scratch:
    command = [sys.executable, "experiments/run.py", "--config=configs/tiny_drelu.py", f"--workdir={scratch}/run",
               f"--config.train.steps={steps}", "--config.analysis.tokens=2000"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
      raise RunFailure(f"the demo failed: {done.stderr.strip().splitlines()[-1]}")
    lines = map(json.loads, Path(scratch, "run", "metrics.jsonl").read_text().splitlines())
    shares = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
  return sum(shares) / len(shares)


def main():
  """Measures, prints the table, writes the JSON."""
  if not FILES.value or not VOCABULARY.value:
    raise UserError("--files and --vocabulary are needed: a folder of .jsonl files and a SentencePiece model.")
  if READER.value:
    return read_here(READER.value)
  cores = sorted(os.sched_getaffinity(0))[: PROCESSES.value]
  os.sched_setaffinity(0, cores)
  installed = [name for name in READERS if name == "tsparse" or importlib.util.find_spec(name)]
  runs = {name: [] for name in installed}
  for _ in range(REPEATS.value):
    for name in installed:
      runs[name].append(measure(name))
  rows = [{"reader": name, "installed": name in runs} | _speeds(runs.get(name, [])) for name in READERS]
  print(f"{len(cores)} cores, rows of {SEQ_LEN.value} tokens")
  print(f"{'':10}{'tokens':>12}{'seconds':>9}{'tokens/s':>12}{'ratio':>7}{'tokens/CPU s':>14}{'ratio':>7}")
  first = rows[0]
  for row in rows:
    if not row["installed"]:
      print(f"{row['reader']:10}not installed: requirements-bench.txt")
      continue
    row["ratio"] = first["per_second"] / row["per_second"]
    row["cpu_ratio"] = first["per_cpu_second"] / row["per_cpu_second"]
    print(
      f"{row['reader']:10}{row['tokens']:12,}{row['seconds']:9.2f}{row['per_second']:12,.0f}{row['ratio']:7.2f}"
      f"{row['per_cpu_second']:14,.0f}{row['cpu_ratio']:7.2f}"
    )
  print("ratio: tsparse over this reader; target 1.0")
  wait = waiting(DEMO.value) if DEMO.value else None
  if wait is not None:
    print(f"waiting for data in {DEMO.value} steps of tiny_drelu: {wait:.2%} of step time; target below {TARGET:.0%}")
  if JSON.value:
    facts = {"cores": len(cores), "seq_len": SEQ_LEN.value, "waiting": wait, "target": TARGET, "rows": rows}
    Path(JSON.value).write_text(files.to_json(facts))


def _speeds(runs: list[dict[str, float]]) -> dict[str, float]:
  if not runs:
    return {}
  best, cpu = min(runs, key=lambda run: run["seconds"]), min(run["cpu"] for run in runs)
  return best | {"cpu": cpu, "per_second": best["tokens"] / best["seconds"], "per_cpu_second": best["tokens"] / cpu}


if __name__ == "__main__":
  cli.script(main, __doc__)
