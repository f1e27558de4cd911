"""Milliseconds of a decoded token: dense, exact-sparse and predicted, beside what the bytes allow and beside others.

python benchmarks/decode.py --json=decode.json --plot=decode.png
python benchmarks/decode.py --shapes=mistral --layers=8
python benchmarks/decode.py --quick

Layers of the published shapes in bfloat16, batch 1, as many as fit; the weights are random and made so that the answer
is known: a token's class, which channels of its embedding say, decides which tenth of the neurons fires (15 % of those
of Mixtral's experts), the gate alone is positive for 32 % (39 %), and the predictors, of the rank published for the
model (and of 512 for mistral_512), read the class. All else in them is noise, read and multiplied like any weight. So
all three modes give the same tokens, which is checked, and the speed is that of a predictor that is right; how right
predictors are is measured by experiments/predictors.py, not here.

The JSON is of the first shape: {"speedup_over_dense": {"exact", "predictor"}, "ideal": {the same}, "bandwidth_share":
{"dense", "exact", "predictor"}} of the layers alone, "peers" with embedding and head, "results" with all of it.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where the kernels run; with libtpu JAX would look for a TPU

import numpy as np
from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

SHAPES = flags.DEFINE_list(
  "shapes", "mistral,mistral_512,mixtral", "Which shapes, of those of KNOWN in constructed.py."
)
LAYERS = flags.DEFINE_integer("layers", 0, "Layers of each shape; 0: as many as a quarter of the free memory holds.")
TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens decoded by each, in turns; the least time counts.", lower_bound=1)
PEERS = flags.DEFINE_boolean("peers", True, "Also transformers and llama.cpp on the same shapes.")
QUICK = flags.DEFINE_boolean("quick", False, "One layer of the Mistral shape and 8 tokens: under a minute.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
PLOT = flags.DEFINE_string("plot", "", "Where a picture of them is written (.png).")

MODES = {"dense": "off", "exact": "exact", "predictor": "predictor"}
SKIPPING = ("exact", "predictor")
PEER_TOKENS = 16  # at most, of which the least time counts
TARGETS = {"dense": 0.8, "exact": 0.85, "predictor": 0.85}  # of the bandwidth; of their ideal speedups


def without_predictors(config: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The same model with none."""
  layers = [{name: w for name, w in layer.items() if name not in ("fc1", "fc2")} for layer in params["layers"]]
  return dataclasses.replace(config, predictor_ranks=(), predictor_input=""), params | {"layers": layers}


def bytes_touched(shape: Any, config: Any, length: int) -> dict[str, float]:
  """Mode -> bytes of weights and cache that one token of the layers must read, at that length of the cache."""
  dim, size, share = config.d_model, config.head_dim, shape.share
  attention = 2 * dim * size * 2 * (config.num_heads + config.num_kv_heads) + 8 * length * config.num_kv_heads * size
  router, chosen = 4 * dim * config.num_experts, max(1, config.experts_per_token)
  matrix = 2 * dim * config.d_ff
  read = {
    "dense": 3 * matrix,
    "exact": (1 + shape.gates + share) * matrix,
    "predictor": 3 * share * matrix + 2 * shape.rank * (dim + config.d_ff),
  }
  return {mode: config.num_layers * (attention + router + chosen * ffn) for mode, ffn in read.items()}


def steppers(
  sparsity: Any, config: Any, params: dict[str, Any], kernels: str, length: int
) -> dict[str, Callable[[int, bool], int]]:
  """Mode -> function of (token, with the head) that decodes one more token and returns the next (0 without).

  It fails where other than the stated share of any layer's neurons fired, since bytes are counted by that.
  """
  import jax
  import jax.numpy as jnp

  from tsparse.sparse.decode import empty_cache, hidden_entries, hidden_states
  from tsparse.sparse.generate import forward

  @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
  def layers_only(config, modes, params, cache, tokens, start):
    return hidden_states(config, kernels, modes, params, cache, tokens, start[:, None], jnp.ones((1, 1), bool))

  entries = np.array(hidden_entries(config))

  def stepper(mode: str) -> Callable[[int, bool], int]:
    model = (config, params) if mode == "predictor" else without_predictors(config, params)
    modes = (MODES[mode],) * config.num_layers
    state = {"cache": empty_cache(config, 1, length), "at": 0}

    def step(token: int, head: bool) -> int:
      tokens, start = np.full((1, 1), token, np.int32), np.full(1, state["at"], np.int32)
      if head:
        logits, state["cache"], fired = forward(
          model[0], kernels, modes, model[1], state["cache"], tokens, start, start + 1
        )
        state["at"] += 1
        share = np.asarray(fired) / entries
        if not np.allclose(share, sparsity.share, rtol=0.1):
          raise AssertionError(f"{mode}: {share} of the layers' neurons fire, and {sparsity.share} are to")
        return int(jnp.argmax(logits[0]))
      hidden, state["cache"], _ = layers_only(model[0], modes, model[1], state["cache"], tokens, start)
      hidden.block_until_ready()
      return 0

    return step

  return {mode: stepper(mode) for mode in MODES}


def bandwidth_reader(params: dict[str, Any]) -> tuple[Callable[[], None], int]:
  """A function that reads weights of up to 1 GB once, by all threads, and how many bytes these are."""
  import jax

  from tsparse.sparse.kernels import native

  arrays, total = [], 0
  for array in jax.tree.leaves(params["layers"]):
    if total < 2**30:
      arrays.append(array)
      total += array.nbytes
  read = jax.jit(lambda arrays: [native.read(array) for array in arrays])
  return lambda: jax.block_until_ready(read(arrays)), total


def measure(name: str, layers: int, tokens: int) -> dict[str, Any]:
  """The figures of one shape."""
  import jax

  from benchmarks.constructed import KNOWN, decoder_of
  from benchmarks.decode_peers import clock

  shape = KNOWN[name]
  config, params = decoder_of(shape, layers)
  steps = steppers(shape, config, params, "native", max(64, 1 << tokens.bit_length()))
  read, read_bytes = bandwidth_reader(params)
  seconds = {head: dict.fromkeys(MODES, float("inf")) for head in (False, True)}
  best, current, said = float("inf"), dict.fromkeys(MODES, 1), {mode: [] for mode in MODES}
  for i in range(tokens + 1):
    times = {(mode, head): None for mode in MODES for head in (False, True)}
    for mode, head in times:
      times[mode, head], token = clock(steps[mode], current[mode], head)
      if head:
        current[mode] = token
        said[mode].append(token)
    read_time, _ = clock(read)
    if i:  # the first compiles
      best = min(best, read_time)
      for (mode, head), value in times.items():
        seconds[head][mode] = min(seconds[head][mode], value)
  if len(set(map(tuple, said.values()))) > 1:
    raise AssertionError(f"the modes do not give the same tokens: {said}")
  touched, head_bytes = bytes_touched(shape, config, tokens // 2), 2 * config.vocab_size * config.d_model
  bandwidth = read_bytes / best
  result = {"shape": name, "layers": layers, "tokens": tokens, "bandwidth_gb_per_s": bandwidth / 1e9}
  for head, key in ((False, "layers_only"), (True, "with_head")):
    moved = {mode: count + head_bytes * head for mode, count in touched.items()}
    result[key] = {
      "milliseconds": {mode: 1e3 * value for mode, value in seconds[head].items()},
      "megabytes": {mode: count / 1e6 for mode, count in moved.items()},
      "bandwidth_share": {mode: moved[mode] / seconds[head][mode] / bandwidth for mode in MODES},
      "speedup_over_dense": {mode: seconds[head]["dense"] / value for mode, value in seconds[head].items()},
      "ideal": {mode: moved["dense"] / count for mode, count in moved.items()},
    }
  del params, steps, read
  jax.clear_caches()
  return result


def measure_peers(name: str, result: dict[str, Any]) -> dict[str, dict]:
  """Peer -> its figures on that shape with embedding and head, or under "missing" why there are none."""
  from benchmarks import decode_peers
  from benchmarks.constructed import KNOWN
  from tsparse.models.config import PRESETS, parameter_counts

  config = dataclasses.replace(PRESETS[KNOWN[name].preset], num_layers=result["layers"])
  tokens, weights = min(result["tokens"], PEER_TOKENS), 2 * sum(parameter_counts(config).values())
  known = {
    "transformers bfloat16": (1, lambda: decode_peers.transformers(config, tokens, "bfloat16")),
    "transformers float32": (2, lambda: decode_peers.transformers(config, tokens, "float32")),
    "llama.cpp float16": (1, lambda: decode_peers.llama_cpp(config, tokens)),
  }
  found, dense = {}, result["with_head"]
  for peer, (width, seconds_of) in known.items():
    if free_bytes() < 1.2 * width * weights:
      found[peer] = {"missing": f"it needs {1.2e-9 * width * weights:.1f} GB of memory"}
      continue
    try:
      seconds = seconds_of()
    except ImportError as error:
      found[peer] = {"missing": f"{error.name} is not installed: requirements-bench.txt"}
      continue
    megabytes = width * dense["megabytes"]["dense"]
    found[peer] = {
      "milliseconds": 1e3 * seconds,
      "megabytes": megabytes,
      "bandwidth_share": megabytes / seconds / 1e3 / result["bandwidth_gb_per_s"],
      "our_speedup": {mode: 1e3 * seconds / value for mode, value in dense["milliseconds"].items()},
    }
  return found


def print_table(result: dict[str, Any]):
  """One shape, for a reader."""
  print(
    f"{result['shape']} x {result['layers']} layers, bfloat16, batch 1, {result['tokens']} tokens in turns, "
    f"memory {result['bandwidth_gb_per_s']:.1f} GB/s"
  )
  print(f"{'':24}{'ms':>9}{'MB':>9}{'of memory':>11}{'speedup':>9}{'ideal':>7}{'of ideal':>10}{'target':>8}")
  for key, title in (("layers_only", "layers alone"), ("with_head", "with embedding, head")):
    part = result[key]
    print(title)
    for mode in MODES:
      speedup, ideal = part["speedup_over_dense"][mode], part["ideal"][mode]
      print(
        f"  {mode:22}{part['milliseconds'][mode]:9.1f}{part['megabytes'][mode]:9.0f}"
        f"{part['bandwidth_share'][mode]:11.2f}{speedup:9.2f}{ideal:7.2f}{speedup / ideal:10.2f}{TARGETS[mode]:8.2f}"
      )
  for peer, part in result["peers"].items():
    if "missing" in part:
      print(f"  {peer:22} not measured: {part['missing']}")
      continue
    ours = ", ".join(f"{mode} {ratio:.2f}x" for mode, ratio in part["our_speedup"].items())
    print(
      f"  {peer:22}{part['milliseconds']:9.1f}{part['megabytes']:9.0f}{part['bandwidth_share']:11.2f}"
      f"   ours by comparison: {ours}"
    )


def draw(results: list[dict[str, Any]], path: Path):
  """Milliseconds of a token, measured beside what the bytes would take at the memory's bandwidth; a panel a shape."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, panels = plt.subplots(1, len(results), figsize=(1.5 + 5 * len(results), 4.2), squeeze=False, dpi=120)
  for axes, result in zip(panels[0], results, strict=True):
    part = result["with_head"]
    bars = {mode: (part["milliseconds"][mode], part["megabytes"][mode]) for mode in MODES}
    bars |= {name: (p["milliseconds"], p["megabytes"]) for name, p in result["peers"].items() if "missing" not in p}
    names = [name.replace(" ", "\n") for name in bars]
    measured, limits = [ms for ms, _ in bars.values()], [mb / result["bandwidth_gb_per_s"] for _, mb in bars.values()]
    colors = ["C0"] * len(MODES) + ["0.6"] * (len(bars) - len(MODES))
    drawn = axes.bar(names, measured, color=colors)
    axes.bar_label(drawn, [f"{part['milliseconds']['dense'] / ms:.2f}x" for ms in measured], padding=3)
    axes.hlines(limits, [i - 0.4 for i in range(len(bars))], [i + 0.4 for i in range(len(bars))], colors="C3", lw=2)
    axes.set_title(f"{result['shape']} x {result['layers']}, embedding and head", fontsize=10)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(y=0.1)
    axes.set_ylabel("ms a token, batch 1")
    axes.spines[["top", "right"]].set_visible(False)
  figure.text(0.5, 0.01, "red: its bytes at the measured bandwidth; x: speed over our dense", ha="center", fontsize=9)
  figure.tight_layout(rect=(0, 0.04, 1, 1))
  figure.savefig(path)


def free_bytes() -> int:
  """Memory that is available now."""
  lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
  return int(lines["MemAvailable"].split()[0]) * 1024


def main():
  """Measures, prints the tables, writes the JSON."""
  from benchmarks.constructed import KNOWN
  from tsparse.models.config import PRESETS, parameter_counts
  from tsparse.sparse.kernels import native

  names = ["mistral"] if QUICK.value else SHAPES.value
  if set(names) - set(KNOWN):
    raise UserError(f"--shapes={','.join(names)}: choose of {', '.join(KNOWN)}.")
  if not native.available():
    raise UserError("this benchmark is of the native kernels, and they cannot be built here.")
  tokens = 8 if QUICK.value else TOKENS.value
  results, peers = [], {}
  for name in names:
    shape = KNOWN[name]
    config = dataclasses.replace(PRESETS[shape.preset], num_layers=1)
    predictors = max(1, config.num_experts) * shape.rank * (config.d_model + config.d_ff)
    one = 2 * (sum(parameter_counts(config).values()) - 2 * config.vocab_size * config.d_model + predictors)
    fit = max(1, min(PRESETS[shape.preset].num_layers, free_bytes() // 4 // one))
    results.append(measure(name, 1 if QUICK.value else LAYERS.value or fit, tokens))
    if PEERS.value and shape.preset not in peers:
      peers[shape.preset] = measure_peers(name, results[-1])
    results[-1]["peers"] = peers.get(shape.preset, {})
    print_table(results[-1])
  if PLOT.value:
    draw(results, Path(PLOT.value))
  first = results[0]["layers_only"]
  fields = {key: {mode: first[key][mode] for mode in SKIPPING} for key in ("speedup_over_dense", "ideal")}
  fields |= {"bandwidth_share": first["bandwidth_share"], "peers": results[0]["peers"]}
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({**fields, "targets": TARGETS, "results": results}))


if __name__ == "__main__":
  cli.script(main, __doc__)
