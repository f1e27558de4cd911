"""Tables 1-3 of Turbo Sparse (arXiv 2406.05955v2) in its own layout, its numbers beside those of an analysis."""

from typing import NamedTuple

# Section 3.1, Table 1: share of the FFN hidden that is inactive. How SwiGLU's 40 % were counted is not stated there.
TABLE_1 = {
  "Llama-2-7B": ("swiglu", 0.40),
  "ReLULlama-7B": ("relu", 0.67),
  "ShiftedReLULlama-7B": ("shifted_relu", 0.71),
}
# Section 3.2, Table 2: training loss, and perplexity on WikiText-2, of 300M models after 5B tokens of fineweb.
TABLE_2 = {"drelu": (3.154, 28.45), "swiglu": (3.146, 28.48)}
# Section 3.2, Table 3: perplexity of the same on WikiText-2 under the top-k mask, at these sparsities.
LEVELS = (0.0, 0.5, 0.8, 0.85, 0.9)
TABLE_3 = {"drelu": (28.45, 28.45, 28.45, 28.65, 29.19), "swiglu": (28.48, 28.62, 36.28, 48.55, 112.36)}

PAPER = "the paper, 300M"


class PaperTable(NamedTuple):
  """As tables.Table."""

  title: str
  columns: list[str]
  rows: list[list[str]]
  key: str
  notes: tuple[str, ...]


def tables(models: list[dict]) -> list[PaperTable]:
  """Tables 1-3, a row of the paper's for each of its models and one for each of `models` (entries of analysis.json)."""
  shown = lambda value: "not finite" if value is None else f"{value:,.2f}"  # noqa: E731
  one = [[name, act, "the paper", f"{zeros:.0%}"] for name, (act, zeros) in TABLE_1.items()]
  two = [[act, PAPER, f"{loss:.3f}", "", f"{ppl:.2f}"] for act, (loss, ppl) in TABLE_2.items()]
  three = [[act, PAPER, *map(shown, perplexities)] for act, perplexities in TABLE_3.items()]
  for m in models:
    zeros, ours = m["zero_fraction"]["mean"], f"{m['name']}, {m['parameters']['total'] / 1e6:,.2f}M"
    one.append([m["name"], m["activation"], ours, "not finite" if zeros is None else f"{zeros:.1%}"])
    held_out = "not finite" if m["loss"] is None else f"{m['loss']:.3f}"
    training = "" if m.get("training_loss") is None else f"{m['training_loss']:.3f}"
    two.append([m["activation"], ours, training, held_out, shown(m["perplexity"])])
    points = {0.0: m["perplexity"]} | {round(p["sparsity"], 6): p["perplexity"] for p in m["curve"]}
    three.append([m["activation"], ours, *(shown(points[level]) if level in points else "" for level in LEVELS)])
  levels = ["0"] + [f"{level:.0%}" for level in LEVELS[1:]]
  same = "Not a reproduction: see under Table 1."
  return [
    PaperTable(
      "The paper's Table 1: sparsity of existing models",
      ["model", "activation", "source", "FFN sparsity"],
      one,
      "paper_1",
      (
        _not_a_reproduction(models),
        "Zeros here are exact zeros of the hidden; how the paper counts SwiGLU's 40% is not stated.",
      ),
    ),
    PaperTable(
      "The paper's Table 2: dReLU against SwiGLU, trained from scratch",
      ["activation", "source", "training loss", "held-out loss", "validation perplexity"],
      two,
      "paper_2",
      (
        f"{same} The paper validates on WikiText-2 and prints no held-out loss. The training "
        "loss here is the mean of the last 5% of the steps in the workdir's metrics.jsonl, a dash where there is none.",
      ),
    ),
    PaperTable(
      "The paper's Table 3: validation perplexity under the top-k mask",
      ["activation", "source", *levels],
      three,
      "paper_3",
      (same,),
    ),
  ]


def _not_a_reproduction(models: list[dict]) -> str:
  """What was used here, and that it is not the paper's experiment."""
  used = []
  for m in models:
    tokens = m.get("trained_tokens")
    trained = f"{tokens / 1e6:,.2f}M tokens seen" if tokens else "tokens seen unknown"
    used.append(f"{m['name']} has {m['parameters']['total'] / 1e6:,.2f}M parameters, {trained}")
  data = ", ".join(dict.fromkeys(m["data"] for m in models))
  return (
    f"Not a reproduction: the paper's models have 300M parameters and saw 5B tokens of fineweb; {'; '.join(used)}; "
    f"evaluated on {data}. Compare the shape of the curves, not the perplexities."
  )
