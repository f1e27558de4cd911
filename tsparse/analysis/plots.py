"""The first view of each chart as a PNG, drawn on bare Figure objects (no pyplot, no global state)."""

import io
import math
from collections.abc import Sequence

from tsparse.analysis.charts import Axis, Chart, View

# Okabe and Ito's colour-blind safe hues, set to a lightness that reads on white and on near-black alike.
COLOURS = ("#2b83c4", "#d9692a", "#159a78", "#b5679d", "#a88a12")
MARKERS = ("o", "s", "D", "^", "v")
DASHES = (
  "-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (10, 3)), (0, (1.5, 1.5, 1.5, 4)), (0, (8, 2, 1, 1)),
)  # fmt: skip
INK, GRID = "#24292f", "#8c959f"
STYLE = {
  "axes.edgecolor": GRID,
  "axes.labelcolor": INK,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 12.5,
  "axes.titlepad": 14,
  "font.size": 11.5,
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
}


def draw(chart: Chart, models: list[str]):
  """A Figure of the chart's first view; `models` are all names, in the order of their colours."""
  return draw_beside([chart], [models])


def draw_beside(charts: Sequence[Chart], models: Sequence[list[str]], height: float | None = None, width: float = 6.2):
  """A Figure of the first views of several charts, side by side, each with names of its own and so many inches big.

  Without a height it is what the names need that stand one under the other.
  """
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  with rc_context(STYLE):
    figure = Figure(figsize=(width * len(charts), height or max(map(_height, charts))), layout="constrained")
    for axes, chart, names in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, models, strict=True):
      view = chart.views[0]
      axes.set_title(chart.title + (f": {view.name}" if view.name else ""))
      axes.tick_params(length=0, pad=7)
      KINDS[chart.kind](axes, view, names)
      axes.set(xlabel=view.x.label, ylabel=view.y.label)
  return figure


def png(figure) -> bytes:
  """The figure on white."""
  from matplotlib import rc_context

  buffer = io.BytesIO()
  with rc_context(STYLE):
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
  return buffer.getvalue()


def _height(chart: Chart) -> float:
  named = {shown.model for shown in chart.views[0].data} if chart.kind in ("lines", "intervals") else ()
  return max(3.9, 1.6 + 0.32 * len(named))


def _lines(axes, view: View, models: list[str]):
  axes.grid(color=GRID, alpha=0.25, lw=0.7)
  styles = list(dict.fromkeys(series.style for series in view.data if series.style))
  ends, xs, ys = {}, [], []
  for series in view.data:
    again, i = divmod(models.index(series.model), 5)  # colours come again, with other dashes
    style = again + (styles.index(series.style) if series.style else 0)
    x, y = zip(*series.points, strict=True)
    xs, ys = [*xs, *x], [*ys, *y]
    if series.mark == "ring":
      axes.plot(x, y, "o", mfc="none", mec=COLOURS[i], mew=1.8, ms=11, clip_on=False, zorder=3)
    elif series.mark == "dots":
      axes.plot(x, y, ".", color=COLOURS[i], ms=6, alpha=0.6, mew=0, clip_on=False)
    elif series.mark == "thin":
      axes.plot(x, y, color=COLOURS[i], lw=0.9, alpha=0.6)
    else:
      marker = MARKERS[i] if len(x) <= 40 and series.mark == "line" else None
      step = "steps-mid" if series.mark == "step" else "default"
      axes.plot(x, y, color=COLOURS[i], ls=DASHES[style % len(DASHES)], marker=marker, ms=4, lw=2, drawstyle=step)
    end = max(series.points)
    if series.mark not in ("dots", "thin") and end > ends.get(series.model, ([-math.inf], ""))[0]:
      ends[series.model] = end, COLOURS[i]
  if any(series.mark == "ring" for series in view.data):
    label = "as it is: natural zeros, nothing masked"
    axes.plot([], [], "o", mfc="none", mec=GRID, mew=1.8, ms=9, label=label)
  for number, style in enumerate(styles):
    scatter = all(series.mark == "dots" for series in view.data if series.style == style)
    thin = any(series.mark == "thin" for series in view.data if series.style == style)
    look = (
      {"marker": ".", "ls": ""} if scatter else {"ls": "-", "lw": 0.9} if thin else {"ls": DASHES[number % len(DASHES)]}
    )
    axes.plot([], [], color=GRID, label=style, **({"lw": 2} | look))
  if axes.get_legend_handles_labels()[0]:
    axes.legend(
      loc="best", frameon=False, labelcolor=INK, fontsize=10, handlelength=2.6, handletextpad=0.5, borderaxespad=0
    )
  _scale(axes.xaxis, view.x, xs)
  _scale(axes.yaxis, view.y, ys)
  _label_ends(axes, [(*point, name, colour) for name, (point, colour) in ends.items()])


def _intervals(axes, view: View, models: list[str]):
  for row, interval in enumerate(view.data):
    colour = COLOURS[models.index(interval.model) % 5]
    axes.plot([interval.low, interval.high], [row, row], color=colour, lw=3, solid_capstyle="butt")
    axes.plot([interval.value], [row], "o", color=colour, ms=8)
  axes.set_yticks(range(len(view.data)), [interval.model for interval in view.data])
  axes.set_ylim(len(view.data) - 0.5, -0.5)
  axes.grid(axis="x", color=GRID, alpha=0.25, lw=0.7)
  _scale(axes.xaxis, view.x, [])


def _heat(axes, view: View, models: list[str]):
  from matplotlib.ticker import MaxNLocator, PercentFormatter

  del models
  values = [[math.nan if value is None else value for value in row] for row in view.data]
  width = max(map(len, values))
  image = axes.imshow([row + [math.nan] * (width - len(row)) for row in values], aspect="auto", cmap="viridis", vmin=0)
  axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=None) if view.shares else None)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _points(axes, view: View, models: list[str]):
  from matplotlib.text import Text

  axes.grid(color=GRID, alpha=0.25, lw=0.7)
  colours = [COLOURS[models.index(series.model) % 5] for series in view.data]
  xs, ys = zip(*(series.points[0] for series in view.data), strict=True)
  axes.scatter(xs, ys, s=36, c=colours, zorder=3)
  _scale(axes.xaxis, view.x, xs)
  _scale(axes.yaxis, view.y, ys)
  axes.margins(0.12, 0.08)
  axes.figure.draw_without_rendering()
  spots = [axes.transData.transform(point) for point in zip(xs, ys, strict=True)]
  scale, taken = axes.figure.dpi / 72, []
  for i in sorted(range(len(spots)), key=lambda i: tuple(-spots[i])):  # from the right
    series, colour, best = view.data[i], colours[i], None
    for dx, dy, align in LABEL_PLACES:
      label = axes.annotate(
        series.model, series.points[0], (dx, dy), textcoords="offset points", color=colour, ha=align, va="center",
        fontsize=9, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "shrinkB": 3},
      )  # fmt: skip
      label.get_window_extent()  # puts it in its place
      box = Text.get_window_extent(label).padded(scale)  # without its line
      hit = sum(box.overlaps(other) for other in taken) + sum(box.padded(4 * scale).contains(*each) for each in spots)
      if best is None or hit < best[0]:
        if best:
          best[1].remove()
        best = hit, label, box
      else:
        label.remove()
      if not hit:
        break
    taken.append(best[2])


# Where the name of a point may stand, in points from it: beside it, above and below, then further and further off.
LABEL_PLACES = [
  (sign * dx, dy, "left" if sign > 0 else "right")
  for far in range(7)
  for dy in ((0, 12 * far, -12 * far) if far else (0,))
  for dx in (9 + 5 * far,)
  for sign in (1, -1)
]
KINDS = {"lines": _lines, "intervals": _intervals, "heat": _heat, "points": _points}


def _scale(axis, settings: Axis, values: list[float]):
  """Scale, limits and numbers of an axis with these values."""
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

  axes, name = axis.axes, axis.axis_name
  low, high = min(values, default=0), max(values, default=1)
  if settings.percent:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
  if settings.limits:
    axes.set(**{f"{name}lim": settings.limits})
  elif low > 0 and (settings.scale == "log" or (settings.scale == "auto" and high > 5 * low)):
    axes.set(**{f"{name}scale": "log"})
    room = 30 if name == "x" else 1e3  # numbers stand beside each other
    axis.set_major_locator(
      LogLocator(base=2) if name == "x" and low >= 1 else LogLocator(subs=(1, 2, 5) if high < room * low else (1,))
    )
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}" if 1e-4 < y < 1e7 else f"{y:.0e}"))
    axis.set_minor_locator(NullLocator())
  elif (
    settings.scale == "auto" and values
  ):  # at least a quarter from bottom to top, so that a change of 1% looks like 1%
    axes.set(**{f"{name}lim": (0.95 * low, max(1.2 * low, 1.05 * high))})
  elif settings.label in ("layer", "expert"):
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  else:
    axis.set_major_locator(MaxNLocator(6))


def _label_ends(axes, ends, gap=15):
  """Writes each name to the right of its line's end, moved where two would touch. Call when the limits are set."""
  figure = axes.figure
  figure.draw_without_rendering()
  to_points = lambda x, y: axes.transData.transform((x, y)) * 72 / figure.dpi  # noqa: E731
  ends = sorted(ends, key=lambda end: end[1])
  heights = [to_points(x, y)[1] for x, y, *_ in ends]
  places, below, above = heights.copy(), -math.inf, axes.bbox.y1 * 72 / figure.dpi
  for i in range(len(places)):  # up, from the lowest on
    below = places[i] = max(places[i], below + gap)
  for i in reversed(range(len(places))):  # and down again where they left the axes
    places[i] = min(places[i], above)
    above = places[i] - gap
  for (x, y, name, colour), height, place in zip(ends, heights, places, strict=True):
    axes.annotate(
      name, (x, y), (10, place - height), textcoords="offset points", color=colour, weight="bold", va="center"
    )
