"""Time of an FFN that skips zeros over one that does not, by share of zeros and batch: where skipping begins to pay.

python benchmarks/break_even.py
python benchmarks/break_even.py --preset=tiny --repeats=2 --json=break_even.json

One dReLU FFN of the preset's shape in bfloat16, neurons firing independently with the square root of the share for the
gate and for up. `--sparse=exact` reads every gate, up where any token of the batch has its gate open, and down where
any has a hidden that is not zero; "bytes" is what that is of the dense FFN's. auto chooses exact wherever the
activation has zeros: it never reads more than dense, and this table says whether it is ever slower.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

PRESET = flags.DEFINE_string("preset", "mistral_7b", "Whose D and F.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Times each is run, in turns; the least counts.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
ZEROS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97)
BATCHES = (1, 2, 4, 8)


def measure(zeros: float, batch: int) -> dict:
  """Seconds of both, and the bytes that exact reads over those of dense."""
  from statistics import NormalDist

  import jax
  import jax.numpy as jnp
  import numpy as np

  from benchmarks.constructed import LOUD, noise
  from tsparse.activations import activation
  from tsparse.models.config import PRESETS
  from tsparse.sparse.kernels import native
  from tsparse.sparse.kernels.reference import Neurons

  config = PRESETS[PRESET.value]
  dim, width, open_ = config.d_model, config.d_ff, (1 - zeros) ** 0.5
  half = noise(dim**-0.5, 1, width, dim)
  half[..., 0] = (NormalDist().inv_cdf(open_) if zeros else 8.0) / LOUD
  weights = Neurons(*map(jax.device_put, (half, half[:, ::-1], noise(width**-0.5, 1, width, dim))))
  x = np.random.default_rng(2).standard_normal((batch, dim), np.float32)
  x[:, 0] = LOUD
  args = x, jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch, 1)), weights

  def ffn(mode):
    return jax.jit(lambda *args: native.feed_forward(mode, activation("drelu"), *args))

  modes = {"dense": ffn("off"), "exact": ffn("exact")}
  seconds = dict.fromkeys(modes, float("inf"))
  for i in range(REPEATS.value + 1):
    for name, run in modes.items():
      start = time.perf_counter()
      run(*args).block_until_ready()
      seconds[name] = min(seconds[name], time.perf_counter() - start) if i else seconds[name]
  read = (1 + (1 - (1 - open_) ** batch) + (1 - zeros**batch)) / 3
  return {"zeros": zeros, "batch": batch, "bytes": read, "ratio": seconds["exact"] / seconds["dense"], **seconds}


def main():
  """Measures, prints the table, writes the JSON."""
  from tsparse.models.config import PRESETS
  from tsparse.sparse.kernels import build

  if PRESET.value not in PRESETS:
    raise UserError(f"--preset={PRESET.value} is unknown: choose one of {', '.join(PRESETS)}.")
  if not build.available():
    raise UserError("this benchmark is of the native kernels, and they cannot be built here.")
  rows = [measure(zeros, batch) for zeros in ZEROS for batch in BATCHES]
  print(f"{'zeros':>6}{'batch':>6}{'dense ms':>10}{'exact ms':>10}{'ratio':>7}{'bytes':>7}")
  for row in rows:
    times = f"{1e3 * row['dense']:10.2f}{1e3 * row['exact']:10.2f}"
    print(f"{row['zeros']:6.2f}{row['batch']:6}{times}{row['ratio']:7.2f}{row['bytes']:7.2f}")
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"preset": PRESET.value, "rows": rows}))


if __name__ == "__main__":
  cli.script(main, __doc__)
