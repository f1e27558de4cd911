"""What the report draws, as data: a chart is made once from analysis.json; the page, the PNGs and the CSVs show it.

Keys of the analysis that are absent leave their chart out. A value that is not finite is no point.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from tsparse.analysis import gap


class Axis(NamedTuple):
  """One axis. `scale` is what it starts with: linear, log, or auto (log from a factor of five on)."""

  label: str
  percent: bool = False
  scale: str = "linear"
  limits: tuple[float, float] | None = None


class Series(NamedTuple):
  """Points [x, y] of one model; `style`, one of the view's, tells the series of a model apart.

  `mark` is line, thin (one of many), step (a histogram: points are the middles of its bins), dots, or ring (one point:
  the model as it is). `label` tells series of one style apart.
  """

  model: str
  points: list[list[float]]
  style: str = ""
  mark: str = "line"
  label: str = ""


class Interval(NamedTuple):
  """A value with its confidence interval."""

  model: str
  value: float
  low: float
  high: float


class View(NamedTuple):
  """One of the pictures of a chart: `data` is a list of Series, a list of Interval, or a matrix [rows][columns], whose
  numbers are shares or not."""

  name: str
  x: Axis
  y: Axis
  data: list
  shares: bool = True


class Chart(NamedTuple):
  """Views of one subject, all of one `kind`: lines, intervals, heat, or points, which the page cannot show. `terms` are
  keys of the definitions."""

  key: str
  title: str
  kind: str
  views: list[View]
  terms: tuple[str, ...]


def charts(analysis: dict[str, Any]) -> list[Chart]:
  """The charts that the analysis (as JSON stores it) has numbers for."""
  made = (make(analysis["models"]) for make in MAKERS)
  result = [chart._replace(views=[view for view in chart.views if view.data]) for chart in made]
  return [chart for chart in result if chart.views]


def rows(chart: Chart) -> Iterator[list]:
  """The chart as the rows of a CSV file, a heading first."""
  if chart.kind == "heat":
    yield ["view", "layer", "expert", "value"]
    for view in chart.views:
      yield from ([view.name, i, j, value] for i, row in enumerate(view.data) for j, value in enumerate(row))
  elif chart.kind == "intervals":
    yield ["view", "model", "value", "low", "high"]
    yield from ([view.name, *interval] for view in chart.views for interval in view.data)
  else:
    yield ["view", "model", "series", "x", "y"]
    for view in chart.views:
      for series in view.data:
        style = "as it is" if series.mark == "ring" else series.label or series.style
        yield from ([view.name, series.model, style, *point] for point in series.points)


SPARSITY = Axis("hidden entries set to zero, per token", percent=True)
PERPLEXITY = Axis("perplexity", scale="auto")


def perplexity_vs_sparsity(models: list[dict]) -> Chart:
  """One line for each model and selection, and a ring where the model is as it is."""
  masked = [m for m in models if any(p["sparsity"] > 0 for p in m.get("curve") or ()) or m.get("curves")]
  lines = []
  for m in masked or models:
    curves = m.get("curves") or [{"selection": "hidden", "points": m.get("curve") or []}]
    lines += [_series(m, _pairs(c["points"], "sparsity", "perplexity"), c["selection"]) for c in curves]
    lines.append(_as_it_is(m))
  title, terms = "Perplexity as hidden entries are set to zero", ("sparsity", "selection", "perplexity")
  return Chart("perplexity_vs_sparsity", title, "lines", [View("", SPARSITY, PERPLEXITY, _drawn(lines))], terms)


def threshold_methods(models: list[dict]) -> Chart:
  """Perplexity by the sparsity that each threshold method gives, and the paper's top-k beside them."""
  lines = []
  for m in models:
    found = {k: v for k, v in (m.get("thresholds") or {}).items() if isinstance(v, list)}
    if found:
      points = {"top-k": m.get("curve") or []} | found
      mark = lambda key: "dots" if key == "ppl_p" else "line"  # noqa: E731 a point, not a curve
      lines += [_series(m, sorted(_pairs(v, "sparsity", "perplexity")), k, mark(k)) for k, v in points.items()]
      lines.append(_as_it_is(m))
  view = View("", Axis("zeros in the hidden (teal: weights that meet a zero)", percent=True), PERPLEXITY, _drawn(lines))
  terms = ("fat", "cats", "teal", "teal_down", "cett", "ppl_p", "calibration", "threshold sparsity")
  return Chart("threshold_methods", "Perplexity by training-free thresholds", "lines", [view], terms)


def frontier(models: list[dict]) -> Chart:
  """Loss above the control by zeros: a ring for each model as it is, and its curves."""
  lines = []
  for m, how, points in gap.frontier(models):
    lines.append(_series(m, points, "" if how == "as it is" else how, "ring" if how == "as it is" else "line"))
  view = View(
    "", Axis("hidden entries that are zero", percent=True), Axis("loss above the control, nats"), _drawn(lines)
  )
  return Chart("frontier", "What zeros cost", "lines", [view], ("gap", "sparsity"))


def training(models: list[dict]) -> Chart:
  """What a recipe did in training: zeros, lambda and loss by step, of each layer where it is steered alone."""
  traces = [(m, m["training"]) for m in models if m.get("training")]
  views = []
  for keys, y in (
    (("zero_fraction", "zeros_wanted"), Axis("zeros in the hidden", percent=True)),
    (("penalty_weight",), Axis("lambda, weight of the penalty", scale="auto")),
    (("loss", "distillation", "sparsity_penalty", "matching"), Axis("parts of the loss, nats")),
  ):
    lines = []
    for m, trace in traces:
      for key in keys:
        values = trace.get(key) or []
        each = list(zip(*values, strict=True)) if values and isinstance(values[0], list) else [values]
        thin = "thin" if len(each) > 1 else "line"
        lines += [
          _series(m, list(zip(trace["step"], of, strict=True)), key.replace("_", " "), thin)._replace(
            label=f"{key} {i}"
          )
          for i, of in enumerate(each)
          if any(of)
        ]
    views.append(View(y.label, Axis("step"), y, _drawn(lines)))
  return Chart("training", "The recipe in training", "lines", views, ("gap",))


def zeros_per_layer(models: list[dict]) -> Chart:
  """The share of zeros of each layer; dots are its experts."""
  lines = []
  for m in models:
    zeros = m["zero_fraction"]
    lines.append(_series(m, list(enumerate(zeros["per_layer"])), "layers"))
    experts = [(i, y) for i, layer in enumerate(zeros.get("per_expert") or ()) if len(layer) > 1 for y in layer]
    lines.append(_series(m, experts, "experts", "dots"))
  y = Axis("hidden entries that are zero", percent=True, limits=(0, 1))
  view = View("", Axis("layer"), y, _drawn(lines))
  return Chart("zeros_per_layer", "Zeros in the FFN hidden, by layer", "lines", [view], ("zero_fraction",))


def zeros_per_position(models: list[dict]) -> Chart:
  """The share of zeros by position of the token in its document."""
  lines = [_series(m, list(enumerate(m["zero_fraction"].get("per_position") or ()))) for m in models]
  y = Axis("hidden entries that are zero", percent=True)
  view = View("", Axis("position of the token in its document"), y, _drawn(lines))
  return Chart("zeros_per_position", "Zeros by position", "lines", [view], ("per_position", "zero_fraction"))


def histograms(models: list[dict]) -> Chart:
  """The distribution of gate, up and hidden: of all layers together, and of each."""
  having = [(m, m["histograms"]) for m in models if m.get("histograms")]
  layers = max((len(h["gate"]) for _, h in having), default=0)
  views = []
  for name in ["all layers", *(f"layer {i}" for i in range(layers))]:
    lines = []
    for m, h in having:
      middles = [(a + b) / 2 for a, b in zip(h["edges"], h["edges"][1:], strict=False)]
      for tensor in ("gate", "up", "hidden"):
        of_layers = h[tensor] if name == "all layers" else h[tensor][int(name[6:]) :][:1]
        shares = [sum(bins) / len(of_layers) for bins in zip(*of_layers, strict=True)]
        lines.append(_series(m, list(zip(middles, shares, strict=False)), tensor, "step"))
    views.append(View(name, Axis("value"), Axis("share of the entries in the bin", percent=True), _drawn(lines)))
  return Chart("histograms", "Values of gate, up and hidden", "lines", views, ("histograms",))


def neuron_cdf(models: list[dict]) -> Chart:
  """How few neurons make how much of the activations."""
  lines = []
  for m in models:
    cdf = (m.get("neurons") or {}).get("cdf")
    if cdf:
      lines.append(_series(m, list(zip(cdf["share_of_neurons"], cdf["share_of_activations"], strict=True))))
  x, y = (Axis(f"share of {what}", percent=True, limits=(0, 1)) for what in ("neurons, hottest first", "activations"))
  view = View("", x, y, _drawn(lines))
  return Chart("neuron_cdf", "Hot and cold neurons", "lines", [view], ("neurons", "cdf", "hot_share_80"))


def neuron_frequency(models: list[dict]) -> Chart:
  """How the zeros are spread over neurons: of all layers together, and of each."""
  having = [(m, m["neurons"]["frequency"]) for m in models if (m.get("neurons") or {}).get("frequency")]
  views = []
  for layer in range(-1, max((len(found["per_layer"]) for _, found in having), default=-1)):  # -1: all
    lines = []
    for m, found in having:
      of_layers = found["per_layer"] if layer < 0 else found["per_layer"][layer:][:1]
      shares = [sum(bins) / len(of_layers) for bins in zip(*of_layers, strict=True)]
      middles = [(a + b) / 2 for a, b in zip(found["edges"], found["edges"][1:], strict=False)]
      lines.append(_series(m, list(zip(middles, shares, strict=False)), mark="step"))
    x, y = Axis("zeros of a neuron", percent=True, limits=(0, 1)), Axis("share of the neurons", percent=True)
    views.append(View("all layers" if layer < 0 else f"layer {layer}", x, y, _drawn(lines)))
  return Chart("neuron_frequency", "Zeros by neuron", "lines", views, ("frequency",))


def union_zeros(models: list[dict]) -> Chart:
  """What is left of the zeros when several tokens are decoded together."""
  y = Axis("neurons that none of them needs", percent=True, limits=(0, 1))
  return Chart("union_zeros", "Zeros of several tokens together", "lines", _unions(models, "zero_fraction", y), UNIONS)


def union_speedup(models: list[dict]) -> Chart:
  """The speedup that those zeros leave room for."""
  y = Axis("expected speedup (times)")
  views = _unions(models, "expected_speedup", y)
  return Chart("union_speedup", "Expected speedup of several tokens together", "lines", views, UNIONS)


UNIONS = ("union", "expected_speedup")


def _unions(models: list[dict], key: str, y: Axis) -> list[View]:
  views = []
  for name, label in (("batch", "unrelated tokens (batch size)"), ("window", "consecutive tokens (window)")):
    points = [(m, (m.get("union") or {}).get(name) or ()) for m in models]
    lines = [_series(m, _pairs(found, "size", key)) for m, found in points]
    views.append(View(name, Axis(label, scale="log"), y, _drawn(lines)))
  return views


def expert_load(models: list[dict]) -> Chart:
  """Which experts the tokens go to, and how sparse each is."""
  views = []
  for m in models:
    experts = m.get("experts") or {}
    for key, what in (("load", "share of the tokens"), ("per_expert_zero_fraction", "zeros")):
      matrix = experts.get(key) or []
      if any(_finite(value) for row in matrix for value in row):
        views.append(View(f"{m['name']}: {what}", Axis("expert"), Axis("layer"), matrix))
  return Chart("expert_load", "Experts: load and zeros", "heat", views, ("load", "entropy", "per_expert_zero_fraction"))


def expert_curves(models: list[dict]) -> Chart:
  """What masking costs inside each expert: a thin line for each, and their mean; views by layer."""
  views = []
  for m in models:
    curves = (m.get("experts") or {}).get("curves") or {}
    for key, y in (("error", Axis("error of the expert's output", percent=True)), ("perplexity", PERPLEXITY)):
      x = SPARSITY if key == "error" else Axis("hidden entries of one expert set to zero", percent=True)
      for layer, of_experts in enumerate(curves.get(key) or ()):
        lines = []
        for expert, values in enumerate(of_experts):
          points = list(zip(curves["levels"], values, strict=True))
          lines.append(_series(m, points, "each expert", "thin")._replace(label=f"expert {expert}"))
        whole = [line.points for line in lines if len(line.points) == len(curves["levels"])]
        mean = [(point[0][0], sum(y for _, y in point) / len(whole)) for point in zip(*whole, strict=True)]
        views.append(View(f"{m['name']}: {key}, layer {layer}", x, y, _drawn([_series(m, mean, "mean"), *lines])))
  return Chart("expert_curves", "Each expert as it is masked", "lines", views, ("expert_curves", "sparsity"))


def expert_thresholds(models: list[dict]) -> Chart:
  """The thresholds of each expert, of each method at its highest setting."""
  views = []
  for m in models:
    for key, points in (m.get("thresholds") or {}).items():
      point = points[-1] if isinstance(points, list) and points else {}
      if point.get("epsilon_per_expert"):
        setting = f"{100 * point['target']:.4g}%" if "target" in point else f"{point['cett']:.3g}"
        name = f"{m['name']}: {key} at {setting}"
        views.append(View(name, Axis("expert"), Axis("layer"), point["epsilon_per_expert"], shares=False))
  terms = ("cats", "teal", "teal_down", "cett", "calibration")
  return Chart("expert_thresholds", "Thresholds of each expert", "heat", views, terms)


def intervals(models: list[dict]) -> Chart:
  """Loss, perplexity and zeros with their intervals."""
  views = []
  for key, axis in (
    ("perplexity", Axis("perplexity")),
    ("loss", Axis("loss, nats per token")),
    ("zero_fraction", Axis("hidden entries that are zero", percent=True)),
  ):
    found = []
    for m in models:
      value = m["zero_fraction"]["mean"] if key == "zero_fraction" else m[key]
      low_high = (m.get("confidence") or {}).get(key)
      if low_high and _finite(value) and all(map(_finite, low_high)):
        found.append(Interval(m["name"], value, *low_high))
    views.append(View(key.replace("_", " "), axis, Axis(""), found))
  return Chart("intervals", "How sure: 95% intervals", "intervals", views, ("confidence", "difference"))


MAKERS = (
  intervals, frontier, training, perplexity_vs_sparsity, threshold_methods, zeros_per_layer, zeros_per_position,
  histograms, expert_load,
  expert_curves, expert_thresholds, neuron_cdf, neuron_frequency, union_zeros, union_speedup,
)  # fmt: skip


def _series(model: dict, points: list, style: str = "", mark: str = "line") -> Series:
  return Series(model["name"], [list(p) for p in points if all(map(_finite, p))], style, mark)


def _as_it_is(model: dict) -> Series:
  return _series(model, [(model["zero_fraction"]["mean"], model["perplexity"])], "", "ring")


def _pairs(points: Any, x: str, y: str) -> list:
  return [(p[x], p[y]) for p in points if x in p and y in p]


def _drawn(lines: list[Series]) -> list[Series]:
  """Those with points; where there is one style only it needs no name."""
  lines = [line for line in lines if line.points]
  styles = {line.style for line in lines} - {""}
  return lines if len(styles) > 1 else [line._replace(style="") for line in lines]


def _finite(value: Any) -> bool:
  return value is not None and math.isfinite(value)
