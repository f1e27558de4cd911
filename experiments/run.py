"""Runs an experiment: trains or ReLUfies what its config says, then analyses it and writes a report.

  python experiments/run.py --config=configs/tiny_relufy.py [--workdir=DIR] [--config.train.steps=500 ...]

The same command resumes an interrupted run where it was, bit for bit. Every field of a config can be overridden by
--config.FIELD=VALUE; configs/default.py explains them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import config_flags

from tsparse import cli
from tsparse.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where it is written. Default: runs/NAME-OF-THE-CONFIG.")


def main():
  """Runs the experiment of the flags."""
  from tsparse.experiment import run  # JAX is imported only once the flags are known to be good

  if CONFIG.value is None:
    raise UserError("--config is missing: give an experiment, for instance --config=configs/tiny_relufy.py.")
  run(CONFIG.value, Path(WORKDIR.value or f"runs/{CONFIG.value.name}"))


if __name__ == "__main__":
  cli.script(main, __doc__)
