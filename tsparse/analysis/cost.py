"""What an analysis costs, piece by piece, in plain forward passes: of the model as it is, with its counts."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tsparse.analysis.experts import alone
from tsparse.analysis.thresholds import BISECTIONS, CETTS
from tsparse.models.config import FFNS, ModelConfig
from tsparse.models.flops import forward_flops

# What a piece does to each entry of the hidden, in operations of a matrix product that take as long: measured for
# SmolLM2-135M's layers on CPU.
OPERATIONS = {"plain": 500, "mask": 700, "histograms": 5600, "magnitudes": 9000, "grid": 10_000, "shares": 400}
SEARCHED = 3  # passes over the calibration text that a search for thresholds takes, of 5 at most


class Cost(NamedTuple):
  """Plain forward passes of a piece of an analysis.

  Attributes:
    text: over the evaluated text.
    first: over its first batch.
    calibration: over the calibration text.
  """

  text: float = 0.0
  first: float = 0.0
  calibration: float = 0.0

  def batches(self, evaluated: int, calibration: int) -> float:
    """The same in plain forward passes over a batch, of texts of so many batches."""
    return self.text * evaluated + self.first + self.calibration * calibration


def pieces(
  config: ModelConfig,
  seq_len: int,
  levels: Sequence[float],
  selections: Sequence[str] = ("hidden",),
  parts: Collection[str] = ("counts",),
) -> dict[str, Cost]:
  """The cost of each piece of `analyze`, by name. Rows that masks leave as they are cost nothing, but count here.

  Args:
    config: the model.
    seq_len: T of a row.
    levels: of the masks.
    selections: of the masks.
    parts: keys of observe.PARTS.
  """
  flops, every = (forward_flops(config, seq_len, every_expert) for every_expert in (False, True))

  def entries(of: dict[str, float]) -> float:  # of a token's hidden
    return sum(of[kind] for kind in FFNS) / (6 * config.d_model)

  def plain(of: dict[str, float]) -> float:
    return sum(of.values()) + OPERATIONS["plain"] * entries(of)

  def probed(name: str, products: int = 0) -> float:  # a probe computes all experts; products by `down` beside it
    return (plain(every) + entries(every) * (OPERATIONS[name] + 2 * config.d_model * products)) / plain(flops)

  number = len([level for level in levels if level > 0])
  masked = 1 + OPERATIONS["mask"] * entries(flops) / plain(flops)
  found = {"natural": Cost(1.0), "masks": Cost(masked * number * len(selections))}
  if "tokens" in parts:
    found["tokens"] = Cost(probed("histograms", (1 + number) * bool(config.num_experts)), first=probed("magnitudes"))
  if "thresholds" in parts:
    search = Cost(calibration=probed("grid", 1) + SEARCHED * probed("shares"))
    found["fat"] = search._replace(text=float(number))
    found |= {"teal_down": Cost(float(number)), "cats": Cost(float(number)), "teal": Cost(probed("shares") * number)}
    found["cett"] = Cost(float(len(CETTS)), calibration=SEARCHED * probed("shares", 1 + len(CETTS)))
    found["ppl_p"] = Cost(float(BISECTIONS))
  if "experts" in parts and config.num_experts:
    found["experts"] = Cost(masked * len(list(alone(config, [level for level in levels if level > 0]))))
  return found
