"""Runs a config several times, each time with other values of some of its fields, and puts the results side by side.

  python experiments/sweep.py --config=configs/tiny_drelu.py --sweep="config.activation=swiglu,relu,drelu" --workdir=DIR
  python experiments/sweep.py --config=configs/ablations/activation.py    the sweep that the file states as SWEEP

Several --sweep make a grid; with --zip the first value of one goes with the first of the others, and so on. Commas
separate values; a value with commas of its own is a tuple in parentheses, or text in quotes:

  --sweep="config.analysis.levels=(0,0.5),(0,0.9)"    --sweep="config.data.mixture='stdlib_docs:3,stdlib_code:1',''"

A value is read as --config.FIELD=VALUE of run.py is. Each run is a process of its own and a workdir of its own, DIR/
activation=relu; --config.FIELD=VALUE holds for all. The same command goes on where it was stopped, and tries again what
failed. Results: DIR/sweep.csv, DIR/sweep.png and DIR/report. With --emit nothing is run: what a cluster's scheduler
takes is printed, to be gathered with --gather afterwards.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import config_flags

from tsparse import cli
from tsparse.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
SWEEP = flags.DEFINE_multi_string("sweep", [], "FIELD=VALUE,VALUE: what differs; may be repeated.")
ZIP = flags.DEFINE_boolean("zip", False, "Pair the values of several --sweep instead of making a grid.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where it is written. Default: runs/sweeps/NAME-OF-THE-CONFIG.")
PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time; here they share the devices of this machine.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Only list the runs and their commands.")
GATHER = flags.DEFINE_boolean("gather", False, "Run nothing; gather the results that are there.")
EMIT = flags.DEFINE_string("emit", None, "Print the sweep for another scheduler: shell, slurm (a job array) or jobset.")
JOBSET = flags.DEFINE_string("jobset", "launch/jobset.yaml", "Pattern of --emit=jobset: only name and command change.")


def main():
  """Runs the sweep of the flags."""
  from tsparse.sweep import runs, sweep  # JAX is imported only once the flags are known to be good
  from tsparse.workdir import local

  if CONFIG.value is None:
    raise UserError("--config is missing: give an experiment, for instance --config=configs/ablations/activation.py.")
  experiment, overrides = flags.FLAGS["config"].config_filename, flags.FLAGS["config"].override_values
  stated = SWEEP.value or runs.stated(experiment)
  folder = local(WORKDIR.value or f"runs/sweeps/{CONFIG.value.name}")
  found = runs.expand(experiment, runs.overrides(overrides), stated, ZIP.value, folder)
  sweep.run(found, folder, PARALLEL.value, DRY_RUN.value, GATHER.value, EMIT.value, Path(JOBSET.value))


if __name__ == "__main__":
  cli.script(main, __doc__)
