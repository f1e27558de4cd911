"""Analyses models: loss, zeros, dead neurons, masked perplexity and activated parameters, with a report.

  python experiments/analyze.py --model=M [--model=M ...] --data=D --out=DIR

M is a workdir of ours or a Hugging Face directory; several are put side by side. D is a file of text (.jsonl, .txt,
.jsonl.gz, .jsonl.zst, .parquet) or a folder of them, all of which is evaluated, or a task or mixture (of
tsparse/data/mixtures.py or seqio), of which the validation split is, as a whole and source by source.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from tsparse import cli
from tsparse.errors import UserError

MODEL = flags.DEFINE_multi_string("model", [], "A workdir of ours or a Hugging Face directory; may be repeated.")
DATA = flags.DEFINE_string("data", None, "The text to evaluate on.")
ALSO = flags.DEFINE_string("also", "", "Another text: loss and zeros on it too, and whether the same neurons are hot.")
ROOT = flags.DEFINE_string("root", "", "Folder or bucket with the sources of a mixture.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Of .jsonl lines and .parquet columns, that holds the text.")
OUT = flags.DEFINE_string("out", None, "The folder to write, which must not exist yet.")
LEVELS = flags.DEFINE_list("levels", "0,0.5,0.8,0.85,0.9", "Shares of the hidden that are masked, each in [0, 1).")
SELECTION = flags.DEFINE_list(
  "selection", "hidden", "Which entries the masks keep: hidden (the paper's), gate, up, contribution."
)
MASK_SHARED = flags.DEFINE_boolean("mask_shared", False, "Mask shared experts too; the paper does not say if it did.")
PAPER = flags.DEFINE_boolean("paper", False, "Add Tables 1-3 of Turbo Sparse, its numbers beside these.")
PARTS = flags.DEFINE_list(
  "parts",
  "counts,tokens,thresholds",
  "What is measured beside zeros and masks; each takes longer than the one before. "
  "`experts` masks one expert after the other: a pass over the text for each of all layers at each level.",
)
EXPORT = flags.DEFINE_string(
  "export", "", "Write how often each neuron fired to OUT/activation, as numpy or powerinfer (.pt) files."
)
TOKENS = flags.DEFINE_integer("tokens", 65_536, "Tokens to evaluate; fewer where the text ends.", lower_bound=1)
MINUTES = flags.DEFINE_float(
  "minutes", 10.0, "Minutes to evaluate; less of the text where all takes longer, 0 is no limit.", lower_bound=0.0
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Rows of a forward pass. Default: 16, or one for each device.", lower_bound=1
)
SEQ_LEN = flags.DEFINE_integer(
  "seq_len", None, "Tokens of a row. Default: as trained here, else 512 or what the models are made for.", lower_bound=1
)
BOS = flags.DEFINE_enum(
  "bos",
  "auto",
  ["auto", "on", "off"],
  "Documents begin with BOS; auto: as each model was trained, or its tokenizer does.",
)
EOS = flags.DEFINE_boolean(
  "eos", None, "Documents end with an end-of-text token, which is scored. Default: if all models were trained with one."
)


def main():
  """Analyses the models of the flags."""
  from tsparse.analysis.run import parse_levels, run  # JAX is imported only once the flags are known to be good

  if not MODEL.value or not DATA.value or not OUT.value:
    raise UserError("--model, --data and --out are needed: give the model, the text and the folder to write.")
  run(
    MODEL.value,
    DATA.value,
    Path(OUT.value),
    levels=parse_levels(LEVELS.value),
    tokens=TOKENS.value,
    selections=tuple(dict.fromkeys(SELECTION.value)),
    mask_shared=MASK_SHARED.value,
    paper=PAPER.value,
    parts=PARTS.value,
    export=EXPORT.value,
    batch_size=BATCH_SIZE.value,
    seq_len=SEQ_LEN.value,
    eos=EOS.value,
    bos=BOS.value,
    root=ROOT.value,
    text_field=TEXT_FIELD.value,
    also=ALSO.value,
    minutes=MINUTES.value,
  )


if __name__ == "__main__":
  cli.script(main, __doc__)
