"""The tables of the report, made once from the numbers as JSON has them: terminal, page and summary print their cells.

Keys of the analysis that are absent leave their table out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tsparse import files
from tsparse.analysis import gap, paper

DEAD = 0.02  # share of the neurons; fewer never fire on a short text and are no cause for alarm


BLANK = "–"  # of a cell with nothing to say, where people read it; CSV files leave it empty


class Table(NamedTuple):
  """A table ready to print: the first `labels` columns are text, the others right-aligned numbers.

  Where the whole is too wide for a terminal it is printed in parts, cut only between groups of `group` columns.
  `key` names its file, `terms` are keys of the definitions, and `notes` are sentences under it.
  """

  title: str
  columns: list[str]
  rows: list[list[str]]
  labels: int = 1
  group: int = 0  # 0: never cut
  key: str = ""
  terms: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  @property
  def shown(self) -> list[list[str]]:
    """The rows as they are printed."""
    return [[cell or BLANK for cell in row] for row in self.rows]


def tables(analysis: dict) -> list[Table]:
  """The tables everyone prints, those that the analysis has numbers for."""
  analysis = files.strict(analysis)
  models = analysis["models"]
  result = [
    quality(models),
    *masked(models),
    *above_control(models, analysis.get("comparisons") or []),
    *confidence(models, analysis.get("comparisons") or []),
    *methods(models),
    *experts(models),
    *expert_curves(models),
    *neurons(models),
    *unions(models),
    *accounts(models),
    *by_source(models),
    *drawn(analysis),
  ]
  if analysis.get("paper"):
    result += [Table(t.title, t.columns, t.rows, labels=2, key=t.key, notes=t.notes) for t in paper.tables(models)]
  return result


def quality(models: list[dict]) -> Table:
  """One row per model, nothing masked."""
  columns = ["model", "activation", "tokens seen", "loss", "perplexity", "zeros", "activated parameters"]
  rows = []
  for m in models:
    parameters = m.get("parameters") or {}
    total = parameters.get("total")
    rows.append([
      m["name"],
      m["activation"],
      count(m.get("trained_tokens")),
      number(m["loss"]),
      perplexity(m["perplexity"]),
      percent(m["zero_fraction"]["mean"]),
      f"{count(parameters.get('activated'), total)} of {count(total)}",
    ])  # fmt: skip
  terms = ("loss", "perplexity", "zero_fraction", "activated", "tokens_seen")
  return Table("Quality and zeros, nothing masked", columns, rows, labels=2, key="quality", terms=terms)


def above_control(models: list[dict], comparisons: list[dict]) -> Iterator[Table]:
  """Zeros and the loss that they cost."""
  rows = []
  for m, difference, bounds in gap.gaps(models, comparisons):
    interval = _interval(bounds, lambda x: f"{x:+.4f}") if bounds else "one document"
    rows.append([m["name"], percent(m["zero_fraction"]["mean"]), f"{difference:+.4f}", interval])
  if rows:
    columns = ["model", "zeros", "loss above control", "95% interval"]
    yield Table("What the zeros cost", columns, rows, key="gap", terms=("gap",))


def masked(models: list[dict]) -> Iterator[Table]:
  """Perplexity by level of sparsity, a table for each selection that has a level above 0."""
  by_selection = {}
  for m in models:
    for curve in m.get("curves") or [{"selection": "hidden", "points": m.get("curve") or []}]:
      points = {round(p["sparsity"], 6): p["perplexity"] for p in curve["points"]}
      if any(level > 0 for level in points):
        by_selection.setdefault(curve["selection"], {})[m["name"]] = {0.0: m["perplexity"]} | points
  for selection, curves in by_selection.items():
    rows = []
    for level in sorted({level for curve in curves.values() for level in curve}):
      row = [_level(level)]
      for curve in curves.values():
        row += [perplexity(curve[level]), _change(curve[level], curve[0.0], level)] if level in curve else ["", ""]
      rows.append(row)
    columns = ["sparsity", *(heading for name in curves for heading in (name, "change"))]
    title = "Masked perplexity, by share of hidden entries set to zero per token"
    title += "" if selection == "hidden" else f"; kept by {selection}"
    yield Table(title, columns, rows, 1, 2, f"masked_{selection}", ("sparsity", "selection", "perplexity"))


def confidence(models: list[dict], comparisons: list[dict]) -> Iterator[Table]:
  """Intervals of each model, and of the differences between models on the same tokens."""
  rows = []
  for m in models:
    found = m.get("confidence") or {}
    if found.get("loss"):
      zeros = found.get("zero_fraction")
      rows.append([
        m["name"],
        _interval(found["loss"], number),
        _interval(found["perplexity"], perplexity),
        _interval(zeros, lambda x: f"{x:.2%}") if zeros else "one document",
        f"{m['documents']:,}",
      ])  # fmt: skip
  if rows:
    columns = ["model", "loss", "perplexity", "zeros", "documents"]
    yield Table("95% intervals over documents", columns, rows, key="confidence", terms=("confidence",))
  rows = []
  for pair in comparisons:
    if pair["interval"] and pair["difference"] is not None:
      (a, b), (low, high) = pair["models"], pair["interval"]
      lower = "not told apart" if low <= 0 <= high else b if high < 0 else a
      rows.append([f"{b} - {a}", f"{pair['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", lower])
  if rows:
    columns = ["loss of", "difference", "95% interval", "lower loss"]
    yield Table("Models on the same tokens, paired", columns, rows, key="comparisons", terms=("difference",))


# Name of a list of `thresholds` -> what its rows are set by.
METHODS = {
  "fat": ("FAT, one threshold", lambda p: f"epsilon {p['epsilon']:.3g}"),
  "cats": ("CATS", lambda p: f"target {_level(p['target'])}"),
  "teal": ("TEAL", lambda p: f"target {_level(p['target'])}"),
  "teal_down": ("TEAL, input of down", lambda p: f"target {_level(p['target'])}"),
  "cett": ("CETT", lambda p: f"CETT {p['cett']:.3g}"),
}


def methods(models: list[dict]) -> Iterator[Table]:
  """Every way to zeros that was measured, for all models in one table: SwiGLU + CATS beside dReLU with top-k."""
  rows, limits = [], []
  for m in models:
    thresholds = m.get("thresholds") or {}
    if not thresholds:
      continue
    name = f"{m['name']} ({m['activation']})"
    rows.append([name, "as it is", "", percent(m["zero_fraction"]["mean"]), perplexity(m["perplexity"]), ""])
    points = [("top-k", _level(p["sparsity"]), p) for p in m.get("curve") or () if p["sparsity"] > 0]
    for key, (method, setting) in METHODS.items():
      points += [(method, setting(p), p) for p in thresholds.get(key) or ()]
    for method, setting, p in points:
      change = _change(p["perplexity"], m["perplexity"], 1)
      rows.append([name, method, setting, percent(p["sparsity"]), perplexity(p["perplexity"]), change])
    limits += [
      [name, f"{p['p']:g}%", percent(p["sparsity"]), f"{p['cett']:.3g}"] for p in thresholds.get("ppl_p") or ()
    ]
  if rows:
    columns = ["model", "zeros by", "setting", "zeros", "perplexity", "change"]
    terms = ("sparsity", *METHODS, "calibration", "threshold sparsity")
    yield Table("Training-free thresholds beside the paper's top-k", columns, rows, 3, key="methods", terms=terms)
  if limits:
    columns = ["model", "perplexity may rise by", "zeros", "CETT"]
    yield Table("PPL-p% sparsity", columns, limits, key="ppl_p", terms=("ppl_p", "cett"))


def experts(models: list[dict]) -> Iterator[Table]:
  """Router and neurons together."""
  rows = []
  for m in models:
    joint = (m.get("experts") or {}).get("joint")
    if joint:
      shares = [joint.get(key) for key in ("routed", "active_in_routed", "active_of_all")]
      printed = joint.get("paper")
      zeros = "" if shares[2] is None else percent(1 - shares[2])
      rows.append([m["name"], *map(percent, shares), percent(printed) if isinstance(printed, float) else "", zeros])
  if rows:
    columns = ["model", "routed", "active in routed", "active of all", "by the paper's product", "zeros of all"]
    yield Table("Router and neurons together", columns, rows, key="experts", terms=("joint", "load", "entropy"))


def expert_curves(models: list[dict]) -> Iterator[Table]:
  """Error of the experts by level, and perplexity with one of them masked, where that was measured."""
  curves = {m["name"]: (m.get("experts") or {}).get("curves") or {} for m in models}
  measured = {"error": ("output's error", percent), "perplexity": ("perplexity", perplexity)}
  measured = {key: how for key, how in measured.items() if any(of.get(key) for of in curves.values())}
  rows = []
  for name, of in curves.items():
    for i, level in enumerate(of.get("levels") or ()):
      row = [name, _level(level)]
      for key, (_, shown) in measured.items():
        layers = enumerate(of.get(key) or ())
        found = [(v[i], f"{layer}.{e}") for layer, experts in layers for e, v in enumerate(experts) if v[i] is not None]
        mean = [shown(sum(value for value, _ in found) / len(found))] if found else [""]
        row += mean + ([shown(min(found)[0]), shown(max(found)[0]), max(found)[1]] if found else ["", "", ""])
      rows.append(row)
  if rows:
    columns = [
      "model",
      "sparsity",
      *(x for what, _ in measured.values() for x in (f"{what}, mean", "least", "most", "of")),
    ]
    note = "of: layer.expert, counted from 0 among the layers that have experts. Perplexity is the whole model's."
    terms = ("expert_curves", "sparsity")
    yield Table("Experts under the mask", columns, rows, 2, 4, "experts_masked", terms, (note,))


def neurons(models: list[dict]) -> Iterator[Table]:
  """Hot neurons and whether they stay the same."""
  rows = []
  for m in models:
    found = m.get("neurons") or {}
    if found.get("hot_share_80"):
      stability = found.get("stability") or {}
      kept = [(stability.get(key) or {}).get("mean") for key in ("hot_overlap", "rank_correlation")]
      shown = [percent(kept[0]) if kept[0] is not None else "", number(kept[1]) if kept[1] is not None else ""]
      rows.append([m["name"], percent(found["hot_share_80"]["mean"]), *shown])
  if rows:
    columns = ["model", "neurons that make 80%", "hottest 20% kept", "rank correlation"]
    terms = ("neurons", "hot_share_80", "stability", "coactivation")
    yield Table("Hot neurons", columns, rows, key="neurons", terms=terms)
  rows = []
  for m in models:
    for pair in (m.get("neurons") or {}).get("between") or ():
      kept = [pair[key]["mean"] for key in ("hot_overlap", "rank_correlation")]
      rows.append([m["name"], " and ".join(pair["texts"]), percent(kept[0]), number(kept[1])])
  if rows:
    columns = ["model", "texts", "hottest 20% kept", "rank correlation"]
    yield Table("Hot neurons on different texts", columns, rows, 2, key="neurons_between", terms=("stability",))


def unions(models: list[dict]) -> Iterator[Table]:
  """Zeros and speedup by number of tokens."""
  for kind, what in (("batch", "unrelated tokens in a batch"), ("window", "consecutive tokens of a document")):
    found = {m["name"]: {p["size"]: p for p in (m.get("union") or {}).get(kind) or ()} for m in models}
    found = {name: points for name, points in found.items() if points}
    rows = []
    for size in sorted({size for points in found.values() for size in points}):
      row = [f"{size:,}"]
      for points in found.values():
        p = points.get(size)
        row += [percent(p["zero_fraction"]), times(p["expected_speedup"])] if p else ["", ""]
      rows.append(row)
    if rows:
      columns = ["tokens", *(heading for name in found for heading in (f"{name} zeros", "expected speedup"))]
      yield Table(f"Zeros of the union: {what}", columns, rows, 1, 2, f"union_{kind}", ("union", "expected_speedup"))


def accounts(models: list[dict]) -> Iterator[Table]:
  """Parameters by what is counted, and operations."""
  found = [m for m in models if (m.get("parameters") or {}).get("accounts")]
  if not found:
    return
  rows = []
  for i, account in enumerate(found[0]["parameters"]["accounts"]):
    row = [f"parameters, {account['name']}"]
    for m in found:
      of = m["parameters"]["accounts"][i]
      row += [count(of["total"]), count(of["activated"], of["total"])]
    rows.append(row)
  row = ["operations of a token (FLOPs)"]
  for m in found:
    row += [count(m["flops"]["total"]), count(m["flops"]["activated"], m["flops"]["total"])]
  columns = ["counted", *(heading for m in found for heading in (m["name"], "activated"))]
  terms = ("activated", "embeddings", "flops")
  yield Table("Parameters and operations of one token", columns, [*rows, row], 1, 2, "accounting", terms)


def by_source(models: list[dict]) -> Iterator[Table]:
  """Loss and zeros of every model on other texts, such as what each source of a mixture holds out."""
  models = [m for m in models if m.get("sources")]
  if not models:
    return
  rows = []
  for name in dict.fromkeys(source["name"] for m in models for source in m["sources"]):
    row = [name]
    for m in models:
      found = next((source for source in m["sources"] if source["name"] == name), None)
      row += [number(found["loss"]), percent(found["zero_fraction"])] if found else ["", ""]
    rows.append(row)
  columns = ["source", *(f"{name} {what}" for name in (m["name"] for m in models) for what in ("loss", "zeros"))]
  yield Table("Held-out loss by source of the data, nats per token", columns, rows, group=2, key="by_source")


def drawn(analysis: dict) -> Iterator[Table]:
  """Of mixtures, of phases, and where lines were left out: what each stage drew from each source."""
  stages = {"main": analysis.get("sources") or []} | (analysis.get("phases") or {})
  several = len(stages) > 1
  if not several and len(stages["main"]) < 2 and not any(source["malformed"] for source in stages["main"]):
    return
  rows = []
  for stage, source in ((stage, source) for stage, sources in stages.items() for source in sources):
    epochs = "unknown" if source["epochs"] is None else f"{source['epochs']:.2f}"
    skipped = f"{source['skipped']:,}" + (f" and {source['malformed']:,} malformed" if source["malformed"] else "")
    share, target = f"{source['share']:.2%}", f"{source['target']:.2%}"
    row = [source["name"], source["category"], count(source["tokens"]), share, target, epochs, skipped]
    rows.append([stage, *row] if several else row)
  columns = ["source", "category", "tokens drawn", "share", "target", "epochs", "lines skipped"]
  columns = ["phase", *columns] if several else columns
  terms = ("data_tokens", "data_epochs", "data_fill")
  yield Table("What training drew from each source", columns, rows, labels=2 + several, key="drawn", terms=terms)


def details(models: list[dict]) -> Table:
  """What was measured where: too wide for a terminal, so only on the page."""
  rows = []
  for m in models:
    dead = m.get("dead_neurons")
    dead = f"{dead['count']:,} of {dead['total']:,}" if dead else "unknown"
    rows.append([m["name"], str(m["model"]), m["data"], f"{m['tokens']:,}", dead])
  columns = ["model", "read from", "evaluated on", "tokens evaluated", "dead neurons"]
  return Table("The models", columns, rows, 3, key="models", terms=("dead_neurons",))


def notes(analysis: dict) -> list[str]:
  """The sentences that belong under the tables: what was evaluated, and what a comparison of losses cannot tell."""
  models = files.strict(analysis)["models"]
  result = []
  texts = [(m["data"], m.get("tokens"), m.get("documents"), m.get("note"), m.get("real_tokens")) for m in models]
  for data in dict.fromkeys(texts):
    names = [m["name"] for m, text in zip(models, texts, strict=True) if text == data]
    who = "" if len(names) == len(models) else f" ({', '.join(names)})"
    documents = "" if data[2] is None else f" in {data[2]:,} document{'s' * (data[2] != 1)}"
    of = "" if data[4] in (None, data[1]) else f"scored of {data[4]:,} "  # of conversations the assistant's alone
    tokens = "" if data[1] is None else f", {data[1]:,} {of}tokens{documents}"
    note = f" ({data[3]})" if data[3] else ""
    result.append(f"Evaluated{who} on {data[0]}{tokens}{note}; loss is in nats per token.")
  leaks = (analysis.get("leakage") or {}).items()
  result += [f"Held-out text{'' if name == 'main' else f' ({name})'}: {found['sentence']}." for name, found in leaks]
  vocabularies = {m["name"]: m.get("vocabulary") for m in models}
  if len(set(vocabularies.values())) > 1:
    named = ", ".join(f"{name} {vocabulary}" for name, vocabulary in vocabularies.items())
    result.append(f"Vocabularies differ ({named}): losses and perplexities are per token of each and do not compare.")
  result += [analysis["budget"]["why"]] if "budget" in analysis else []
  result += [f"Alarm: {sentence}" for m in models for sentence in alarms(m)]
  most, others = tokens_unlike_most(models)
  if others:
    brief = len(models) - len(others) > 3
    named = others if brief else {m["name"]: m.get("trained_tokens") for m in models}
    counts = ", ".join(f"{name} {count(n)}" for name, n in named.items()) + f", the others {count(most)}" * brief
    result.append(f"Tokens seen differ ({counts}): part of a lower loss can be plain further training.")
  return result


def tokens_unlike_most(models: Sequence[dict]) -> tuple[int | None, dict[str, int | None]]:
  """How many tokens most models have seen, and by name those of the models that have seen another number."""
  seen = {m["name"]: m.get("trained_tokens") for m in models}
  most = Counter(seen.values()).most_common(1)[0][0]
  return most, {name: n for name, n in seen.items() if n != most}


def alarms(model: dict) -> Iterator[str]:
  """Sentences about layers without an entry that fires, neurons that are dead and experts that got no token."""
  name, zeros, dead = model["name"], model["zero_fraction"], model.get("dead_neurons") or {}
  if silent := [str(layer) for layer, share in enumerate(zeros["per_layer"]) if share == 1]:
    yield f"{name} has layers that are all zeros ({', '.join(silent)}): their FFNs do nothing."
  if dead and dead["count"] > DEAD * dead["total"]:
    yield f"{name} has {dead['count']:,} neurons of {dead['total']:,} that never fired on the evaluated text."
  experts = enumerate(zeros.get("per_expert") or ())
  lost = [f"{layer}.{e}" for layer, shares in experts for e, share in enumerate(shares) if share is None]
  if lost:
    yield f"{name} has experts that no token reached (layer.expert {', '.join(lost)})."


def count(n, scale=None) -> str:
  """1234567 as 1.23M. `scale` chooses the unit, so that two counts of one cell share it."""
  if n is None:
    return "unknown"
  for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    if max(n, scale or 0) >= unit:
      return f"{n / unit:.2f}{name}"
  return f"{n:,}"


def perplexity(value) -> str:
  """Two decimals, fewer for large ones."""
  if value is None:
    return "not finite"
  return f"{value:,.2f}" if value < 1e3 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def number(value) -> str:
  """Three decimals."""
  return "not finite" if value is None else f"{value:.3f}"


def percent(share) -> str:
  """A share with one decimal."""
  return "not finite" if share is None else f"{share:.1%}"


def times(ratio) -> str:
  """A speedup with two decimals; without end where nothing is read (null in the JSON)."""
  return "∞" if ratio is None else f"{ratio:.2f}×"


def _level(share: float) -> str:
  return f"{100 * share:.4g}%"


def _interval(bounds: list, shown: Any) -> str:
  return " to ".join("not finite" if bound is None else shown(bound) for bound in bounds)


def _change(value, unmasked, level) -> str:
  """Relative to the unmasked perplexity: a percentage, or from ten times on the factor."""
  if level == 0 or not unmasked or value is None:
    return ""
  ratio = value / unmasked
  return f"{ratio - 1:+.1%}".replace("-0.0%", "+0.0%") if ratio < 10 else f"×{perplexity(ratio)}"
