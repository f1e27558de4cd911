"""The two pictures of the report, drawn from the analysis dict on bare Figure objects (no pyplot, no global state).

One drawing serves every reader: `png` puts it on white, `svg` leaves it transparent and lets the page choose the ink.
"""

import io
import math
import re

# Okabe and Ito's colour-blind safe hues, set to a lightness that reads on white and on near-black alike.
COLOURS = ("#2b83c4", "#d9692a", "#159a78", "#b5679d", "#a88a12")
MARKERS = ("o", "s", "D", "^", "v")
INK = "#24292f"  # text and axes; `svg` turns exactly this colour into the page's own text colour
GRID = "#8c959f"
STYLE = {
  "axes.edgecolor": GRID,
  "axes.labelcolor": INK,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 12.5,
  "axes.titlepad": 14,
  "font.size": 11.5,
  "svg.fonttype": "none",
  "svg.hashsalt": "tsparse",
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
}


def perplexity_vs_sparsity(analysis):
  """Perplexity against the share of hidden entries set to zero, one line per model that has a masked curve.

  The ring is the model as it is: its own share of zeros and its unmasked perplexity. Values that are not finite are
  left out; y is logarithmic where the values drawn span more than a factor of five.
  """
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

  models = list(enumerate(analysis["models"]))
  models = [(i, m) for i, m in models if any(p["sparsity"] > 0 for p in m.get("curve") or ())] or models
  figure, axes = _axes("Perplexity as hidden entries are set to zero")
  ends, values = [], []
  for i, model in models:
    curve = [(p["sparsity"], p["perplexity"]) for p in model.get("curve") or ()]
    natural = (model["zero_fraction"]["mean"], model["perplexity"])
    curve = sorted(p for p in curve if _finite(*p))
    axes.plot(*zip(*curve, strict=True) if curve else ([], []), color=COLOURS[i % 5], marker=MARKERS[i % 5], ms=4, lw=2)
    if _finite(*natural):
      axes.plot(*natural, "o", mfc="none", mec=COLOURS[i % 5], mew=1.8, ms=11, clip_on=False, zorder=3)
      curve.append(natural)
    if curve:
      ends.append((*max(curve, key=lambda p: p[0]), model["name"], COLOURS[i % 5]))
      values += [y for _, y in curve]
  if values and max(values) > 5 * min(values):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1e3 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}" if 1e-3 < y < 1e7 else f"{y:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())
  elif values:  # at least a quarter from bottom to top, so that a change of 1% looks like 1%
    axes.set_ylim(0.95 * min(values), max(1.2 * min(values), 1.05 * max(values)))
  axes.plot([], [], "o", mfc="none", mec=GRID, mew=1.8, ms=9, label="as it is: natural zeros, nothing masked")
  axes.legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=10.5, handletextpad=0.3, borderaxespad=0)
  axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
  axes.set(xlabel="hidden entries set to zero, per token", ylabel="perplexity")
  axes.set_xlim(-0.03, max((x for x, *_ in ends), default=1) + 0.03)
  axes.margins(y=0.14)
  _label_ends(axes, ends)
  return figure


def zeros_per_layer(analysis):
  """Share of hidden entries that are exactly zero, layer by layer; for MoE, thin bars span its experts (dots)."""
  from matplotlib.ticker import MaxNLocator, PercentFormatter

  models = analysis["models"]
  moe = any(len(experts) > 1 for m in models for experts in m["zero_fraction"].get("per_expert") or ())
  title = "Zeros in the FFN hidden, by layer"
  figure, axes = _axes(title + (" (dots: single experts)" if moe else ""))
  ends = []
  for i, model in enumerate(models):
    zeros = model["zero_fraction"]
    colour, shift = COLOURS[i % 5], 0.06 * (i - (len(models) - 1) / 2) if moe else 0.0
    points = [(layer + shift, y) for layer, y in enumerate(zeros["per_layer"]) if _finite(y)]
    if not points:
      continue
    axes.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[i % 5], ms=5.5, lw=2, clip_on=False, zorder=3)
    for layer, experts in enumerate(zeros.get("per_expert") or ()):
      experts = [y for y in experts if _finite(y)]
      if len(experts) > 1:
        x = layer + shift
        axes.plot([x, x], [min(experts), max(experts)], color=colour, lw=1.2, alpha=0.6, clip_on=False)
        axes.plot([x] * len(experts), experts, ".", color=colour, ms=6, alpha=0.6, mew=0, clip_on=False)
    ends.append((*points[-1], model["name"], colour))
  layers = max((len(m["zero_fraction"]["per_layer"]) for m in models), default=1)
  pad = 0.02 * layers if layers > 1 else 0.5
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axes.set(xlabel="layer", ylabel="hidden entries that are zero", ylim=(0, 1), xlim=(-pad, layers - 1 + pad))
  _label_ends(axes, ends)
  return figure


def png(figure) -> bytes:
  """The figure on white."""
  return _save(figure, format="png", dpi=160, facecolor="white")


def svg(figure) -> str:
  """The figure as an <svg> element to put in a page: transparent, ink in the page's text colour, no outside names."""
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  text = _save(figure, format="svg", transparent=True, metadata=nothing).decode()
  text = text[text.index("<svg") :]
  text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # HTML knows both namespaces; a page without URLs is easy to check
  text = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*"', r"\1", text)
  text = re.sub(r'(<svg\b[^>]*?)\sheight="[^"]*"', r"\1", text)
  return text.replace(INK, "currentColor")


def _axes(title):
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  with rc_context(STYLE):
    figure = Figure(figsize=(6.2, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(color=GRID, alpha=0.25, lw=0.7)
    axes.tick_params(length=0, pad=7)
  return figure, axes


def _label_ends(axes, ends, gap=15):
  """Writes each name to the right of its line's end, pushed up where two would touch. Call when the limits are set."""
  figure = axes.figure
  figure.draw_without_rendering()
  to_points = lambda x, y: axes.transData.transform((x, y)) * 72 / figure.dpi  # noqa: E731
  below = -math.inf
  for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
    height = to_points(x, y)[1]
    below = max(height, below + gap)
    axes.annotate(
      name, (x, y), (10, below - height), textcoords="offset points", color=colour, weight="bold", va="center"
    )


def _save(figure, **options) -> bytes:
  from matplotlib import rc_context

  buffer = io.BytesIO()
  with rc_context(STYLE):
    figure.savefig(buffer, **options)
  return buffer.getvalue()


def _finite(*values) -> bool:
  return all(v is not None and math.isfinite(v) for v in values)
