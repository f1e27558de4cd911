"""Trains neuron predictors for a sparse model: which entries of its FFN hidden will not be zero, asked before they are.

  python experiments/predictors.py --model=M --data=D [--out=DIR]

M is a workdir of ours or a Hugging Face directory whose activation has exact zeros (dReLU, ReGLU), D as in run.py.
They are written beside M, where generate.py finds them, and measured beside a truncated SVD of the gate: recall,
precision, what is read for a token, and perplexity.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from tsparse import cli
from tsparse.errors import UserError

MODEL = flags.DEFINE_string("model", None, "A workdir of ours or a Hugging Face directory.")
DATA = flags.DEFINE_string("data", None, "The text to train on.")
VALIDATION = flags.DEFINE_string("validation", "", "The text to measure on. Default: what the data holds out.")
ROOT = flags.DEFINE_string("root", "", "Folder or bucket with the sources of a mixture.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Of .jsonl lines and .parquet columns, that holds the text.")
OUT = flags.DEFINE_string("out", None, "The folder to write, which must not exist yet. Default: MODEL/predictors.")
INPUT = flags.DEFINE_string("input", "before_norm", "What predictors read: before_norm, or after_norm as the FFN does.")
BUDGET = flags.DEFINE_float("budget", 0.12, "Share of the FFN's weights that predictors hold, shared among the layers.")
RECALL = flags.DEFINE_float("recall", 0.95, "Share of the neurons that fire which predictors are to find.")
BOS = flags.DEFINE_enum(
  "bos",
  "auto",
  ["auto", "on", "off"],
  "Documents begin with BOS; auto: as the model was trained, or its tokenizer does.",
)
STEPS = flags.DEFINE_integer("steps", 500, "Batches of text that are trained on.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "Peak of the learning rate. Default: 0.08 / sqrt(D).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows of a batch.", lower_bound=1)
SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens of a row. Default: as trained here, else 512.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 32_768, "Tokens to measure on; fewer where the text ends.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the order of the text and of the initial weights.")


def main():
  """Trains the predictors of the flags."""
  from tsparse.sparse.predictors.run import run  # JAX is imported only once the flags are known to be good

  if not MODEL.value or not DATA.value:
    raise UserError("--model and --data are needed: give the model and the text to train its predictors on.")
  out = Path(OUT.value) if OUT.value else None
  sizes = {"batch_size": BATCH_SIZE.value, "seq_len": SEQ_LEN.value, "tokens": TOKENS.value}
  text = {"validation": VALIDATION.value, "root": ROOT.value, "text_field": TEXT_FIELD.value, "bos": BOS.value}
  training = {"steps": STEPS.value, "learning_rate": LEARNING_RATE.value, "seed": SEED.value}
  choice = {"source": INPUT.value, "budget": BUDGET.value, "recall": RECALL.value}
  run(Path(MODEL.value), DATA.value, out, **choice, **training, **text, **sizes)


if __name__ == "__main__":
  cli.script(main, __doc__)
