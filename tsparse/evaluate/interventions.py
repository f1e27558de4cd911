"""What `--sparse` asks of an evaluation: which entries of the FFN hidden are zero while the questions are answered.

The masks are the analysis's own (masks.py, thresholds.py), and generation decodes with the same (sparse/decode.py).
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from tsparse.analysis.masks import TopK, topk_everywhere
from tsparse.analysis.thresholds import Magnitude
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig, ffn_layers

DEFINITIONS = {
  "off": "the model as it is, with the predictors that it holds itself (TurboSparse)",
  "exact": "rows of the FFN that meet an exact zero are not read: the numbers of `off`; generation runs the decoder's "
  "kernels, which skip them",
  "predictor": "entries that the neuron predictors do not expect are zero: hidden * (logit of the predictor > its "
  "threshold), by those the model holds, those beside it, or --predictors",
  "topk:S": "of the hidden of each token, in each FFN (in each routed expert), the round(S F) entries of smallest "
  "absolute value are zero, more where more are by nature; among equals the later index (Turbo Sparse, arXiv "
  "2406.05955, eq. 3-4)",
  "threshold:T": "the entries with |hidden| < T are zero, one T for the model (FAT-epsilon, arXiv 2402.13516)",
  "zeros": "share of exact zeros in the hidden, over all tokens of the scored questions and their contexts and all "
  "layers; generated tokens are not counted",
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to evaluate a model: a `method`, a key of METHODS or of LEVELS, with its level in the latter case."""

  method: str
  level: float | None = None

  @property
  def name(self) -> str:
    """As it is written on the command line."""
    return self.method if self.level is None else f"{self.method}:{self.level:g}"


METHODS = ("off", "exact", "predictor")


def _topk(config: ModelConfig, level: float, shared: bool) -> dict[str, TopK]:
  return topk_everywhere(level, config, shared=shared)


def _threshold(config: ModelConfig, level: float, shared: bool) -> dict[str, Magnitude]:
  layers = {kind: length for kind, length in ffn_layers(config).items() if shared or kind != "shared"}
  return {kind: Magnitude(jnp.full((length,), level, jnp.float32)) for kind, length in layers.items()}


# Method -> (its intervention by kind of FFN, what a level may be, in words).
LEVELS: dict[str, tuple[Callable, Callable[[float], bool], str]] = {
  "topk": (_topk, lambda level: 0 <= level < 1, "a share of zeros, 0 <= level < 1"),
  "threshold": (_threshold, lambda level: 0 <= level < math.inf, "a magnitude, 0 or more"),
}


def intervention(setting: Setting, config: ModelConfig, shared: bool) -> dict | None:
  """What the Transformer takes; None where the hidden is left alone. `shared` masks shared experts too."""
  return LEVELS[setting.method][0](config, setting.level, shared) if setting.method in LEVELS else None


def _number(text: str) -> float:
  """NaN where it is none."""
  try:
    return float(text)
  except ValueError:
    return math.nan


def parse(texts: Sequence[str]) -> list[Setting]:
  """["off", "topk:0.5", "0.9"] -> the settings in their order; a level alone is one more of the method before it.

  Raises:
    UserError: one is unknown, given twice, or has a level that cannot be.
  """
  settings, method = [], ""
  for text in texts:
    if method in LEVELS and not math.isnan(_number(text)):
      text = f"{method}:{text}"
    method, colon, level = text.partition(":")
    if method in METHODS and not colon:
      settings.append(Setting(method))
      continue
    if method not in LEVELS:
      known = [*METHODS, *(f"{name}:LEVEL" for name in LEVELS)]
      nearest = difflib.get_close_matches(method, [*METHODS, *LEVELS], n=1, cutoff=0.0)[0]
      raise UserError(f"--sparse={text} is unknown, the nearest is {nearest}; choose of {', '.join(known)}.")
    _, holds, words = LEVELS[method]
    if not holds(_number(level)):
      raise UserError(f"--sparse={text}: {level!r} is no level of {method}, which is {words}.")
    settings.append(Setting(method, _number(level)))
  twice = next((setting.name for setting in settings if settings.count(setting) > 1), None)
  if twice:
    raise UserError(f"--sparse={twice} is given twice: give it once.")
  return settings
