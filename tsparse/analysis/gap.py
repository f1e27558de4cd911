"""What zeros cost: the loss of each model above that of the control, which trained as long and kept its activation."""

from collections.abc import Iterator
from typing import Any

CONTROL = "control"

DEFINITIONS = {
  "gap": "loss of a model minus that of the control on the same held-out tokens, nats per token; the control starts "
  "from the same model and trains on the same tokens in the same batches with the activation it started with, so that "
  "the gap is what the zeros cost and not what more training gains (a control that config.control.workdir names has "
  "trained as its own config says). Its interval is that of `difference`",
}


def control_of(models: list[dict]) -> dict | None:
  """The entry of the control, if there is one."""
  return next((m for m in models if m["name"] == CONTROL), None)


def gaps(models: list[dict], comparisons: list[dict]) -> Iterator[tuple[dict, float, list[float] | None]]:
  """(model, gap, interval) of each model with zeros that was compared with the control."""
  control = control_of(models)
  for pair in comparisons if control else ():
    if CONTROL not in pair["models"] or pair["difference"] is None:
      continue
    sign = 1 if pair["models"][0] == CONTROL else -1
    name = pair["models"][pair["models"].index(CONTROL) - 1]
    model = next(m for m in models if m["name"] == name)
    if model["zero_fraction"]["mean"]:
      bounds = pair["interval"]
      yield model, sign * pair["difference"], bounds and sorted(sign * bound for bound in bounds)


def frontier(models: list[dict]) -> Iterator[tuple[dict, str, list[list[float]]]]:
  """(model, how zeros are made, points [zeros, gap]) of each curve; "as it is" has one point."""
  control = control_of(models)
  if control is None:
    return
  for m in models:
    if _near(m, control):
      yield m, "as it is", [[m["zero_fraction"]["mean"], m["loss"] - control["loss"]]]
    thresholds = m.get("thresholds") or {}
    curves = {"top-k": m.get("curve") or []} | {key: thresholds.get(key) or [] for key in ("cats", "teal_down")}
    for how, found in curves.items():
      points = sorted([p["sparsity"], p["loss"] - control["loss"]] for p in found if _near(p, control))
      if points:
        yield m, how, points


def _near(point: dict[str, Any], control: dict) -> bool:
  """Farther off it is no model any more, and would flatten the others."""
  return point["loss"] is not None and point["loss"] - control["loss"] < 1
