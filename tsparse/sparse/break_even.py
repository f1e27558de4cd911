"""What `--sparse=auto` goes by: the time of an FFN that skips zeros over that of one that reads all its rows.

RATIO[mode][zeros][batch] was printed by benchmarks/break_even.py: one dReLU FFN of Mistral's shape (D 4096, F 14336) in
bfloat16 by the native kernels, `batch` tokens whose zeros are independent of each other's, medians of 30 runs. That was
on 2 CPU cores with AVX-512 which other processes used too, hence the odd ratio around 1 where bytes are all but equal:
it is to be made again on an idle machine. Where the FFN fits the caches skipping pays later (from 90 % zeros in the
tiny preset), and nothing was measured on TPUs and GPUs: the table serves there for want of another.
"""

from collections.abc import Sequence

RATIO = {
  "exact": {
    0.00: {1: 1.01, 2: 1.05, 4: 1.01, 8: 0.98},
    0.25: {1: 0.96, 2: 0.98, 4: 1.08, 8: 1.00},
    0.50: {1: 0.76, 2: 0.88, 4: 0.94, 8: 1.12},
    0.60: {1: 0.71, 2: 0.87, 4: 1.00, 8: 0.99},
    0.75: {1: 0.62, 2: 0.69, 4: 0.83, 8: 0.98},
    0.85: {1: 0.56, 2: 0.67, 4: 0.80, 8: 0.91},
    0.90: {1: 0.49, 2: 0.63, 4: 0.76, 8: 0.91},
    0.95: {1: 0.46, 2: 0.52, 4: 0.68, 8: 0.78},
    0.98: {1: 0.42, 2: 0.45, 4: 0.58, 8: 0.69},
  },
  "predictor": {
    0.00: {1: 0.98, 2: 1.07, 4: 1.02, 8: 1.01},
    0.25: {1: 0.82, 2: 0.93, 4: 1.00, 8: 1.01},
    0.50: {1: 0.59, 2: 0.77, 4: 0.90, 8: 0.97},
    0.60: {1: 0.52, 2: 0.70, 4: 0.83, 8: 0.92},
    0.75: {1: 0.37, 2: 0.53, 4: 0.66, 8: 0.80},
    0.85: {1: 0.28, 2: 0.40, 4: 0.52, 8: 0.64},
    0.90: {1: 0.23, 2: 0.31, 4: 0.41, 8: 0.53},
    0.95: {1: 0.19, 2: 0.24, 4: 0.29, 8: 0.37},
    0.98: {1: 0.16, 2: 0.19, 4: 0.20, 8: 0.24},
  },
}


def choose_mode(candidates: Sequence[str], zeros: float, batch: int) -> str:
  """The candidate of the least ratio, "off" (1) where none is below it.

  The table is read where it is not more favourable than what is asked: at the most zeros measured up to `zeros`, and at
  the smallest batch measured from `batch` on. Of a larger batch the kernels make groups of the largest measured one.

  Args:
    candidates: "off" and keys of RATIO.
    zeros: share of the hidden that is exactly zero.
    batch: tokens that meet the neurons together.
  """

  def ratio(mode: str) -> float:
    if mode == "off":
      return 1.0
    by_batch = RATIO[mode][max((z for z in RATIO[mode] if z <= zeros), default=min(RATIO[mode]))]
    return by_batch[min((b for b in by_batch if b >= batch), default=max(by_batch))]

  return min(candidates, key=ratio)
