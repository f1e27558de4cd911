"""Says whether an experiment fits on a slice of TPUs and what it costs there; nothing is allocated, no TPU is needed.

  python experiments/plan.py --config=configs/mistral_drelu.py --topology=v5p:4x4x4 [--config.train.microbatches=32 ...]

The training step itself is compiled for the slice, by libtpu where it is installed (requirements-tpu.txt; otherwise
memory is estimated, as by --nocompile in seconds). --topology=cpu:8 compiles for virtual CPU devices.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import config_flags

from tsparse import cli
from tsparse.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file of configs/.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, such as v5p:4x4x8, v5e:16x16, v6e:16x16 or cpu:8.")
ZEROS = flags.DEFINE_float("zero_fraction", 0.9, "Share of zeros for the operations that the sparse FFN would need.")
COMPILE = flags.DEFINE_boolean("compile", True, "Compile the step, minutes for a slice of TPUs; if not, estimate.")
OUT = flags.DEFINE_string("out", None, "The JSON file. Default: runs/plans/NAME-OF-THE-CONFIG_TOPOLOGY.json.")


def main():
  """Plans the experiment of the flags."""
  from tsparse.plan import run  # JAX is imported only once the flags are known to be good

  if CONFIG.value is None or TOPOLOGY.value is None:
    raise UserError("--config and --topology are needed, for instance --topology=v5p:4x4x8.")
  name = f"{CONFIG.value.name}_{TOPOLOGY.value.replace(':', '_')}.json"
  run(CONFIG.value, TOPOLOGY.value, ZEROS.value, Path(OUT.value or f"runs/plans/{name}"), COMPILE.value)


if __name__ == "__main__":
  cli.script(main, __doc__)
