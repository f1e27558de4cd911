"""Looks at training data: what a mixture is made of and where its sources are (list), and what their text is (stats).

  python experiments/data.py --mixture=M list [--root=FOLDER]
  python experiments/data.py --mixture=M stats [--root=FOLDER] [--vocabulary=V] [--evals=FOLDER ...] [--out=DIR]

M is a name of tsparse/data/mixtures.py, what config.data.train takes, or "name:weight,name:weight". stats reads all
that would be trained on: how much of it there is, how long documents are, which are copies, and which items of
evaluation sets stand in it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from tsparse import cli
from tsparse.errors import UserError

MIXTURE = flags.DEFINE_string("mixture", None, "The data: a mixture, a source, a file or folder, or weights of those.")
ROOT = flags.DEFINE_string("root", "", "Folder or bucket with the sources of a mixture.")
VOCABULARY = flags.DEFINE_string("vocabulary", "bytes", "What tokens are, as config.data.vocabulary.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Of .jsonl lines and .parquet columns, that holds the text.")
ALLOW_MISSING = flags.DEFINE_boolean("allow_missing", False, "Leave out the sources that are missing.")
SKIP_BAD = flags.DEFINE_integer("skip_bad", 0, "Malformed lines of each source that are counted and left out.", 0)
EVALS = flags.DEFINE_multi_string("evals", [], "A .jsonl file of evaluation items or a folder of them; repeatable.")
NGRAM = flags.DEFINE_integer("ngram", 13, "Words in a row that an evaluation item and the text must share.")
MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", None, "Measure so many documents of each source, at random.", 1)
TOKENS = flags.DEFINE_integer("tokens", None, "Tokens of a run, for how often it would read each source.", 1)
OUT = flags.DEFINE_string("out", None, "The folder for statistics.json and statistics.png, which must not exist yet.")


def main(word: str):
  """Lists or measures the data of the flags."""
  from tsparse.data import overview  # imported only once the flags are known to be good
  from tsparse.data.settings import DataSettings

  if not MIXTURE.value:
    raise UserError("--mixture is missing: give the data to look at, for instance --mixture=stdlib.")
  data = DataSettings(
    **{"mixture" if overview.is_weighted(MIXTURE.value) else "train": MIXTURE.value},
    root=ROOT.value,
    vocabulary=VOCABULARY.value,
    text_field=TEXT_FIELD.value,
    allow_missing=ALLOW_MISSING.value,
    skip_bad=SKIP_BAD.value,
  )
  if word == "list":
    overview.show_list(data)
  else:
    out = Path(OUT.value) if OUT.value else None
    overview.run(data, EVALS.value, NGRAM.value, MAX_DOCUMENTS.value, TOKENS.value, out)


if __name__ == "__main__":
  cli.script(main, __doc__, ("list", "stats"))
