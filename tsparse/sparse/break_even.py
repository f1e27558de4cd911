"""What `--sparse=auto` goes by: the time of an FFN that skips zeros over that of one that reads all its rows.

RATIO[mode][zeros][batch] was printed by benchmarks/break_even.py: one dReLU FFN of Mistral's shape (D 4096, F 14336) in
bfloat16 by the native kernels, `batch` tokens whose zeros are independent of each other's, medians of 30 runs
on 2 idle CPU cores with AVX-512. It is above 1 where one of 8 tokens wants nearly every row, and asking each costs more
than it saves. Where the FFN fits the caches skipping pays later (from 90 % zeros in the tiny preset). Of the kernels
for TPUs and GPUs nothing was measured, and `auto` is "off" there.
"""

from collections.abc import Sequence

MEASURED = ("native",)  # keys of kernels.table.KERNELS
RATIO = {
  "exact": {
    0.00: {1: 1.02, 2: 1.01, 4: 1.00, 8: 1.00},
    0.25: {1: 0.89, 2: 0.99, 4: 1.00, 8: 1.01},
    0.50: {1: 0.75, 2: 0.90, 4: 1.00, 8: 1.17},
    0.60: {1: 0.69, 2: 0.85, 4: 0.97, 8: 1.28},
    0.75: {1: 0.59, 2: 0.73, 4: 0.89, 8: 0.98},
    0.85: {1: 0.51, 2: 0.64, 4: 0.82, 8: 0.73},
    0.90: {1: 0.45, 2: 0.57, 4: 0.73, 8: 0.85},
    0.95: {1: 0.40, 2: 0.49, 4: 0.64, 8: 0.77},
    0.98: {1: 0.39, 2: 0.44, 4: 0.56, 8: 0.64},
  },
  "predictor": {
    0.00: {1: 1.02, 2: 1.02, 4: 1.01, 8: 1.01},
    0.25: {1: 0.81, 2: 0.94, 4: 0.99, 8: 1.01},
    0.50: {1: 0.59, 2: 0.77, 4: 0.91, 8: 0.97},
    0.60: {1: 0.50, 2: 0.67, 4: 0.85, 8: 0.94},
    0.75: {1: 0.35, 2: 0.51, 4: 0.74, 8: 0.81},
    0.85: {1: 0.25, 2: 0.38, 4: 0.55, 8: 0.64},
    0.90: {1: 0.21, 2: 0.30, 4: 0.43, 8: 0.54},
    0.95: {1: 0.15, 2: 0.21, 4: 0.31, 8: 0.39},
    0.98: {1: 0.13, 2: 0.16, 4: 0.20, 8: 0.27},
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
