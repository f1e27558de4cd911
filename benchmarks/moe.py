"""Time of a layer of experts, by each implementation, over that of a dense FFN with the same active FLOPs.

python benchmarks/moe.py
python benchmarks/moe.py --implementations=ragged --repeats=20 --json=moe.json

FLOPs: matrix products over the dense FFN's, the least the ratio can be where both multiply as fast. Target 1.5.
On one device nothing is gathered: ep_allgather is ragged there, with another name.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens of the batch.")
D_MODEL = flags.DEFINE_integer("d_model", 512, "D.")
WIDTH = flags.DEFINE_integer("width", 2048, "Neurons a token meets: F of the dense FFN, F * top_k of the experts.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Times each is run, in turns; the least counts.")
IMPLEMENTATIONS = flags.DEFINE_string(
  "implementations", "ragged,ep_allgather,ep_ragged_a2a,dense", "Which, separated by commas."
)
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
EXPERTS = ((8, 2), (64, 8))  # E and top_k: Mixtral's, and OLMoE's
LIMIT = 1.5


def layers(experts: int, chosen: int) -> dict:
  """Name -> (function of x and weights, weights): the dense FFN and each implementation, over random arrays.

  None instead of those that this platform cannot run.
  """
  import jax
  import jax.numpy as jnp

  from tsparse.activations import activation
  from tsparse.models.ffn import feed_forward
  from tsparse.models.moe import IMPLEMENTATIONS as KNOWN
  from tsparse.models.moe import ONLY_ON, Experts, moe
  from tsparse.models.router import router_logits

  act, dim, width = activation("drelu"), D_MODEL.value, WIDTH.value
  narrow = width // chosen
  names = IMPLEMENTATIONS.value.split(",")
  unknown = set(names) - set(KNOWN)
  if unknown or width % chosen:
    raise UserError(
      f"--implementations {sorted(unknown)} unknown, of {list(KNOWN)}; or --width no multiple of {chosen}."
    )
  valid = jnp.ones((1, TOKENS.value), bool)

  def weights(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) * dim**-0.5 for key, shape in zip(keys, shapes, strict=True)]

  dense = weights((dim, width), (dim, width), (width, dim))
  routed = weights((experts, dim, narrow), (experts, dim, narrow), (experts, narrow, dim), (dim, experts))

  def of(name):
    def layer(x, gate, up, down, router):
      return moe(name, x, router_logits(x, router), Experts(gate, up, down), valid, act, chosen)

    here = jax.default_backend()
    return (layer, routed) if ONLY_ON.get(name, here) == here else None

  ffn = {"dense FFN": (lambda x, gate, up, down: feed_forward(x, gate, up, down, valid, act), dense)}
  return ffn | {name: of(name) for name in names}


def least(functions: dict) -> dict:
  """Name -> least seconds of its runs, taken in turns, so that a busy machine is busy for all."""
  import jax

  for function, arguments in functions.values():
    jax.block_until_ready(function(*arguments))
  seconds = dict.fromkeys(functions, float("inf"))
  for _ in range(REPEATS.value):
    for name, (function, arguments) in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function(*arguments))
      seconds[name] = min(seconds[name], time.perf_counter() - start)
  return seconds


def measure(experts: int, chosen: int) -> list[dict]:
  """One row for each implementation: seconds and ratios, forward and forward + gradient."""
  import jax

  x = jax.random.normal(jax.random.key(1), (1, TOKENS.value, D_MODEL.value))
  forward, gradient = {}, {}
  table = layers(experts, chosen)
  for name, (layer, weights) in ((name, entry) for name, entry in table.items() if entry):

    def loss(x, *weights, layer=layer):
      out, counts = layer(x, *weights)
      return out.var(), counts

    forward[name] = jax.jit(layer), (x, *weights)
    gradient[name] = jax.jit(jax.grad(loss, argnums=range(len(weights) + 1), has_aux=True)), (x, *weights)
  forward, gradient = least(forward), least(gradient)

  def figures(name):
    if not table[name]:
      return {}
    return {
      "forward_ms": 1e3 * forward[name],
      "forward_ratio": forward[name] / forward["dense FFN"],
      "gradient_ms": 1e3 * gradient[name],
      "gradient_ratio": gradient[name] / gradient["dense FFN"],
      "flops_ratio": experts / chosen if name == "dense" else 1.0,
    }

  return [{"experts": experts, "top_k": chosen, "layer": name, **figures(name)} for name in table]


def main():
  """Measures, prints the table, writes the JSON."""
  from tsparse.train.allocator import keep_freed_memory

  keep_freed_memory()  # as experiments/run.py does
  rows = [row for experts, chosen in EXPERTS for row in measure(experts, chosen)]
  flops = 6 * TOKENS.value * D_MODEL.value * WIDTH.value
  print(
    f"{TOKENS.value} tokens, D {D_MODEL.value}, {WIDTH.value} neurons a token: {flops / 1e9:.1f} GFLOP forward, float32"
  )
  print(
    f"{'E':>3}{'top_k':>6}  {'layer':13}{'forward ms':>11}{'ratio':>7}{'+ gradient ms':>15}{'ratio':>7}{'FLOPs':>7}"
  )
  for row in rows:
    name = f"{row['experts']:3}{row['top_k']:6}  {row['layer']:13}"
    if "forward_ms" not in row:
      print(f"{name}  cannot run on this platform")
      continue
    print(
      f"{name}{row['forward_ms']:11.1f}{row['forward_ratio']:7.2f}{row['gradient_ms']:15.1f}{row['gradient_ratio']:7.2f}"
      f"{row['flops_ratio']:7.1f}"
    )
  print(f"FLOPs: matrix products over the dense FFN's, the least the ratio can be; target of the ratio: {LIMIT}")
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"tokens": TOKENS.value, "target": LIMIT, "rows": rows}))


if __name__ == "__main__":
  cli.script(main, __doc__)
