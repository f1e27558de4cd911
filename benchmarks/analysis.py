"""Time of a masked forward over the plain one, and of a sweep of 10 levels over 10 plain forwards.

python benchmarks/analysis.py
python benchmarks/analysis.py --tokens=512 --layers=4 --repeats=10 --json=analysis.json

A model of whole layers (attention, norms, FFN) of Mistral-7B's shape, D 4096 and F 14336, float32, SwiGLU, with random
weights and the head of the byte vocabulary. Figures: benchmarks/README.md. Target of each ratio: 1.25.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files

TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of the batch, one row.")
LAYERS = flags.DEFINE_integer("layers", 2, "Layers; each has 0.87 GB of weights by default.")
D_MODEL = flags.DEFINE_integer("d_model", 4096, "D, a multiple of 128, the length of a head.")
D_FF = flags.DEFINE_integer("d_ff", 14_336, "F.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Times each is run, in turns; the least counts.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
LEVELS = tuple(i / 10 for i in range(10))
LIMIT = 1.25


def measure() -> list[dict]:
  """One row for each thing timed: its name, least seconds, and the ratio to as many plain forwards."""
  import jax
  import numpy as np

  from tsparse import sharding
  from tsparse.analysis import masks
  from tsparse.evaluate.perplexity import evaluate_each
  from tsparse.models.config import ModelConfig
  from tsparse.models.transformer import Transformer, init_parameters

  heads = D_MODEL.value // 128
  config = ModelConfig(
    vocab_size=264, num_layers=LAYERS.value, d_model=D_MODEL.value, d_ff=D_FF.value, num_heads=heads,
    num_kv_heads=max(1, heads // 4), head_dim=128, max_seq_len=TOKENS.value, dtype="float32",
  )  # fmt: skip
  model, row = Transformer(config), np.arange(TOKENS.value, dtype=np.int32)[None]
  batch = {"inputs": row % 259, "targets": row % 259, "segment_ids": np.ones_like(row), "positions": row}
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(lambda key: init_parameters(model, key))(jax.random.key(0))
    norms = jax.jit(masks.down_norms, static_argnums=0)(config, params)

    def of(selection, level):
      return masks.topk_everywhere(level, config, norms if selection == "contribution" else None, selection)

    timed = {"plain": [None]}
    timed |= {f"masked by {selection}": [of(selection, 0.9)] for selection in masks.SELECTIONS}
    timed["sweep of 10 levels"] = [of("hidden", level) for level in LEVELS]
    seconds = dict.fromkeys(timed, float("inf"))
    for turn in range(1 + REPEATS.value):  # the first compiles
      for name, interventions in timed.items():
        start = time.perf_counter()
        evaluate_each(model, params, [batch], mesh, interventions)
        if turn:
          seconds[name] = min(seconds[name], time.perf_counter() - start)
  return [
    {"what": name, "forwards": len(timed[name]), "seconds": s, "ratio": s / (len(timed[name]) * seconds["plain"])}
    for name, s in seconds.items()
  ]


def main():
  """Measures, prints the table, writes the JSON."""
  rows, entries = measure(), TOKENS.value * D_FF.value * LAYERS.value
  attention = 2 * 2.5 * TOKENS.value * D_MODEL.value**2 * LAYERS.value
  print(
    f"{LAYERS.value} layers, {TOKENS.value} tokens, D {D_MODEL.value}, F {D_FF.value}, float32: "
    f"{(6 * entries * D_MODEL.value + attention) / 1e9:.1f} GFLOP a forward without scores; "
    f"a mask reads {31 * 4 * entries / 1e9:.2f} GB in 31 passes at most where no values are equal"
  )
  print(f"{'':22}{'forwards':>9}{'seconds':>9}{'ratio':>7}")
  for row in rows:
    print(f"{row['what']:22}{row['forwards']:9}{row['seconds']:9.3f}{row['ratio']:7.2f}")
  print(f"ratio: over as many plain forwards; target {LIMIT}")
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"tokens": TOKENS.value, "target": LIMIT, "rows": rows}))


if __name__ == "__main__":
  cli.script(main, __doc__)
