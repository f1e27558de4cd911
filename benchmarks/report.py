"""Time of the default report of a ReLUfication over that of a plain forward pass over the same tokens.

python benchmarks/report.py --model=MODEL --data=TEXTS
python benchmarks/report.py --model=MODEL --data=TEXTS --recovered=WORKDIR --tokens=8192 --json=report.json

The report is that of configs/relufy.py: the model as it is and the recovered one, each with the masks of the default
levels, and the swapped one. Without --recovered the swapped model stands for the recovered one, which has fewer zeros.
All programs are compiled before. Figures: benchmarks/README.md. Target of the ratio: 10.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

MODEL = flags.DEFINE_string("model", "", "A SwiGLU model, a workdir of ours or a Hugging Face directory.")
DATA = flags.DEFINE_string("data", "", "The text that is evaluated.")
RECOVERED = flags.DEFINE_string("recovered", "", "The same model ReLUfied; by default only its activation is swapped.")
TOKENS = flags.DEFINE_integer("tokens", 65_536, "How many tokens are evaluated.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 256, "Tokens of a row.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows of a forward pass.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
LIMIT = 10.0


def measure(model: str, data: str, recovered: str, tokens: int, seq_len: int, batch_size: int) -> dict:
  """Seconds of the plain pass and of the report, their ratio, and the passes over the text that the report took."""
  import dataclasses

  import jax
  from rich.console import Console

  from configs import default
  from tsparse import sharding
  from tsparse.analysis import budget, curves
  from tsparse.analysis.run import Case, analyze_cases
  from tsparse.convert.model import open_model
  from tsparse.data import DataSettings, evaluation_batches
  from tsparse.evaluate import perplexity
  from tsparse.models.transformer import Transformer, abstract_parameters
  from tsparse.train import checkpoint

  stored = open_model(Path(model))
  settings = DataSettings(train="", validation=data, vocabulary=stored.vocabulary, eos=stored.eos)
  text = evaluation_batches(settings, seq_len=seq_len, batch_size=batch_size, max_tokens=tokens)
  levels = default.get_config().analysis.levels
  swapped, last = dataclasses.replace(stored.config, activation="drelu"), open_model(Path(recovered or model))
  ran = []

  def counted(function):
    def call(*arguments):
      ran.append(function)
      return function(*arguments)

    call.lower = function.lower
    return call

  def cases(text):
    return [
      Case("base", stored, stored.config, text, data, levels),
      Case("swapped", stored, swapped, text, data, ()),
      Case("recovered", last, dataclasses.replace(last.config, activation="drelu"), text, data, levels),
    ]

  mesh, console = sharding.evaluation_mesh([stored.config.d_model]), Console(quiet=True)
  plain = Transformer(stored.config)
  shapes, logical = abstract_parameters(plain)
  with jax.set_mesh(mesh):
    analyze_cases(cases(budget.first_batches(text, 1)), mesh, console)  # compiles
    params, _ = stored.restore(checkpoint.abstract(shapes, sharding.shardings(mesh, logical)))
    start = time.perf_counter()
    perplexity.evaluate(plain, params, text.batches, mesh)
    seconds = time.perf_counter() - start
    del params
    kept = perplexity.compiled, curves.losses
    perplexity.compiled, curves.losses = map(counted, kept)
    start = time.perf_counter()
    analysis = analyze_cases(cases(text), mesh, console)
    took = time.perf_counter() - start
    perplexity.compiled, curves.losses = kept
  return {
    "tokens": text.tokens, "batches": len(text.batches), "plain_seconds": seconds, "report_seconds": took,
    "ratio": took / seconds, "forwards": (len(ran) + 1) / len(text.batches),  # and the one that is timed
    "masked": sum(function is kept[1] for function in ran) / len(text.batches),
    "estimated": sum(map(budget.forwards, cases(text))) / len(text.batches),
    "zero_fraction": analysis["models"][-1]["zero_fraction"]["mean"],
  }  # fmt: skip


def main():
  """Measures, prints, writes the JSON."""
  if not MODEL.value or not DATA.value:
    raise UserError("--model and --data are needed: give a SwiGLU model and the text to evaluate on.")
  row = measure(MODEL.value, DATA.value, RECOVERED.value, TOKENS.value, SEQ_LEN.value, BATCH_SIZE.value)
  print(f"{row['tokens']:,} tokens in {row['batches']} batches; {row['zero_fraction']:.1%} zeros in the last model")
  print(f"plain forward pass  {row['plain_seconds']:9.1f} s")
  print(f"report              {row['report_seconds']:9.1f} s  ratio {row['ratio']:.2f}, target {LIMIT:g}")
  masked = f"{row['masked']:.2f} of them masked; estimated {row['estimated']:.2f}"
  print(f"passes              {row['forwards']:9.2f}    {masked}")
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"target": LIMIT, "rows": [row]}))


if __name__ == "__main__":
  cli.script(main, __doc__)
