"""Evaluates a model on tasks of lm-evaluation-harness, as it is or with its FFN hidden masked.

  python experiments/evaluate.py --model=M --tasks=commonsense --out=DIR
  python experiments/evaluate.py --model=M --tasks=arc_easy:5,questions.jsonl --sparse=off,topk:0.5,0.9 --out=DIR

M is a workdir of ours or a Hugging Face directory. Tasks are those of lm-eval, each with :SHOTS if others than its own;
the suites openllm, commonsense and section4; and files: .jsonl of {"query", "choices", "gold"} or of {"text"}, and
.yaml of lm-eval. docs/evaluate.md has their data and the masks.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # and not this folder: lm-eval imports a package `evaluate`

from absl import flags

from tsparse import cli
from tsparse.errors import UserError

MODEL = flags.DEFINE_string("model", None, "A workdir of ours or a Hugging Face directory.")
TASKS = flags.DEFINE_list("tasks", [], "What is asked, see above.")
OUT = flags.DEFINE_string("out", None, "The folder to write, which must not exist yet.")
SPARSE = flags.DEFINE_list("sparse", ["off"], "off, exact, predictor, topk:SHARE,... and threshold:T,...: the columns.")
PREDICTORS = flags.DEFINE_string(
  "predictors", None, "Folder of those of --sparse=predictor. Default: MODEL/predictors."
)
MASK_SHARED = flags.DEFINE_boolean("mask_shared", False, "Mask shared experts too; the paper does not say if it did.")
DATA = flags.DEFINE_string("data", None, "Folder with copies of data sets of the Hub, for machines without network.")
LIMIT = flags.DEFINE_integer("limit", None, "The first so many questions of each task. Default: all.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows of a forward pass. Default: 16, or one for each device.", 1)
MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens of the context. Default: what the model is made for.")
BOS = flags.DEFINE_enum(
  "bos", "auto", ["auto", "on", "off"], "Texts begin with BOS; auto: as the model was trained, or its tokenizer does."
)
SAMPLES = flags.DEFINE_boolean("samples", False, "Write each question and answer too.")


def main():
  """Evaluates the model of the flags."""
  if not MODEL.value or not TASKS.value or not OUT.value:
    raise UserError("--model, --tasks and --out are needed: give the model, what to ask and the folder to write.")
  from tsparse.evaluate.run import run  # JAX is imported only once the flags are known to be good

  predictors, data = (Path(flag.value) if flag.value else None for flag in (PREDICTORS, DATA))
  masks = {"sparse": SPARSE.value, "predictors": predictors, "mask_shared": MASK_SHARED.value}
  sizes = {"limit": LIMIT.value, "batch_size": BATCH_SIZE.value, "max_length": MAX_LENGTH.value}
  run(
    Path(MODEL.value), TASKS.value, Path(OUT.value), **masks, **sizes, data=data, bos=BOS.value, samples=SAMPLES.value
  )


if __name__ == "__main__":
  cli.script(main, __doc__)
