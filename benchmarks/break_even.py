"""Time of an FFN that skips zeros over one that does not, by share of zeros and batch: where skipping begins to pay.

python benchmarks/break_even.py
python benchmarks/break_even.py --preset=tiny --repeats=2 --json=break_even.json

One dReLU FFN of the preset's shape in bfloat16, neurons and tokens firing independently of each other.
"exact": with the square root of the share for the gate and for up; it reads every gate, up where any token of the batch
has its gate open, and down where any has a hidden that is not zero. "predictor": gate and up are always positive, and a
predictor of rank 9 % of F (Mistral's is 1260 of 14,336) says which neurons count, for dense too; it reads the neurons
that any token of the batch wants. "bytes" is what that is of what dense reads. The ratio is the median over the runs,
each over the dense one just before, since other load changes from run to run; the times are the least. The ratios are
what --sparse=auto goes by: they are copied to tsparse/sparse/break_even.py.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where the kernels run; with libtpu JAX would look for a TPU

from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

PRESET = flags.DEFINE_string("preset", "mistral_7b", "Whose D and F.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Times each is run, in turns.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
ZEROS = (0.0, 0.25, 0.5, 0.6, 0.75, 0.85, 0.9, 0.95, 0.98)
BATCHES = (1, 2, 4, 8)


def ffn_of(mode: str, zeros: float) -> tuple:
  """Neurons and predictor (fc1, fc2, or None) of which the share `zeros` of the hidden is zero."""
  from statistics import NormalDist

  import jax
  import numpy as np

  from benchmarks.constructed import LOUD, noise
  from tsparse.models.config import PRESETS
  from tsparse.sparse.kernels.reference import Neurons

  config = PRESETS[PRESET.value]
  dim, width, rank = config.d_model, config.d_ff, round(0.088 * config.d_ff)
  open_ = (1 - zeros) ** 0.5 if mode == "exact" else 1.0
  half = noise(dim**-0.5, 1, width, dim)
  half[..., 0] = (NormalDist().inv_cdf(open_) if open_ < 1 else 8.0) / LOUD  # x[0] is LOUD: half x is N(that, 1)
  neurons = Neurons(*map(jax.device_put, (half, half[:, ::-1], noise(width**-0.5, 1, width, dim))))
  if mode == "exact":
    return neurons, None
  fc1, fc2 = noise(dim**-0.5, 1, rank, dim), noise((rank / 2) ** -0.5, 1, width, rank)  # relu(N(0, 1)) has square 1/2
  fc1[:, 0] = 0
  fc1[:, 0, 0] = 1.0
  fc2[..., 0] = (NormalDist().inv_cdf(1 - zeros) if zeros else 8.0) / LOUD
  return neurons, tuple(map(jax.device_put, (np.ascontiguousarray(fc1), np.ascontiguousarray(fc2))))


def measure(mode: str, zeros: float, batch: int, neurons: tuple, fc: tuple | None) -> dict:
  """Seconds of both, the share of zeros that came about, and the bytes that `mode` reads over those of dense."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from benchmarks.constructed import LOUD
  from tsparse.activations import activation
  from tsparse.sparse.kernels import native
  from tsparse.sparse.kernels.reference import Predictor

  (_, width, dim), drelu = neurons.gate.shape, activation("drelu")
  x = np.random.default_rng(2).standard_normal((batch, dim), np.float32)
  x[:, 0] = LOUD
  args = x, jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch, 1)), neurons, fc and Predictor(*fc, x)
  runs = {
    name: jax.jit(lambda *args, key=key: native.feed_forward(key, drelu, *args))
    for name, key in (("dense", "off"), ("sparse", mode))
  }
  seconds = {name: [] for name in runs}
  for _ in range(REPEATS.value + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      _, fired = jax.block_until_ready(run(*args))
      seconds[name].append(time.perf_counter() - start)
  pairs = list(zip(seconds["sparse"], seconds["dense"], strict=True))[1:]  # the first compiles
  union, rank = 1 - zeros**batch, fc[0].shape[1] * (dim + width) / (dim * width) if fc else 0.0
  read = 3 * union + rank if fc else 1 + (1 - (1 - (1 - zeros) ** 0.5) ** batch) + union
  return {
    "mode": mode, "zeros": zeros, "batch": batch, "measured_zeros": 1 - float(fired.mean()) / width,
    "bytes": read / (3 + rank), "ratio": median(sparse / dense for sparse, dense in pairs),
    **{name: min(times[1:]) for name, times in seconds.items()},
  }  # fmt: skip


def main():
  """Measures, prints the table, writes the JSON."""
  from tsparse.models.config import PRESETS
  from tsparse.sparse.kernels import native

  if PRESET.value not in PRESETS:
    raise UserError(f"--preset={PRESET.value} is unknown: choose one of {', '.join(PRESETS)}.")
  if not native.available():
    raise UserError("this benchmark is of the native kernels, and they cannot be built here.")
  rows = []
  print(f"{'mode':>10}{'zeros':>7}{'batch':>6}{'dense ms':>10}{'sparse ms':>10}{'ratio':>7}{'bytes':>7}")
  for mode in ("exact", "predictor"):
    for zeros in ZEROS:
      made = ffn_of(mode, zeros)
      for batch in BATCHES:
        row = measure(mode, zeros, batch, *made)
        rows.append(row)
        times = f"{1e3 * row['dense']:10.2f}{1e3 * row['sparse']:10.2f}"
        print(f"{mode:>10}{zeros:7.2f}{batch:6}{times}{row['ratio']:7.2f}{row['bytes']:7.2f}", flush=True)
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"preset": PRESET.value, "rows": rows}))


if __name__ == "__main__":
  cli.script(main, __doc__)
