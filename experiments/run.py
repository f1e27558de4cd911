"""Runs an experiment: trains or ReLUfies what its config says, then analyses it and writes a report.

  python experiments/run.py --config=configs/tiny_relufy.py [--workdir=DIR] [--config.train.steps=500 ...]

The same command resumes an interrupted run where it was, bit for bit. Every field of a config can be overridden by
--config.FIELD=VALUE; configs/default.py explains them. On several hosts each runs the same command, with a workdir that
all of them see: on a TPU pod as it is, elsewhere with --coordinator, --num_hosts and --host_id.
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
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several hosts, free there.")
NUM_HOSTS = flags.DEFINE_integer("num_hosts", None, "How many hosts there are.")
HOST_ID = flags.DEFINE_integer("host_id", None, "Which of them this is, from 0.")


def main():
  """Runs the experiment of the flags."""
  from tsparse import hosts  # JAX is imported only once the flags are known to be good
  from tsparse.experiment import run
  from tsparse.train.allocator import keep_freed_memory
  from tsparse.workdir import local

  if CONFIG.value is None:
    raise UserError("--config is missing: give an experiment, for instance --config=configs/tiny_relufy.py.")
  workdir = local(WORKDIR.value or f"runs/{CONFIG.value.name}")
  hosts.start(COORDINATOR.value, NUM_HOSTS.value, HOST_ID.value)
  keep_freed_memory()
  run(CONFIG.value, workdir)


if __name__ == "__main__":
  cli.script(main, __doc__)
