"""Model FLOPs utilisation of training steps on the accelerator at hand, tokens per second, and where the time goes.

python benchmarks/mfu.py                                     (a dense and a MoE model of 1B active parameters, bfloat16)
python benchmarks/mfu.py --model=dense_1b --batch_size=16 --remat=full --json=mfu.json

Without an accelerator two tiny models in float32 take their place: it shows that this runs, and nothing else.
"""

import collections
import dataclasses
import glob
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

MODEL = flags.DEFINE_multi_string("model", [], "dense_1b, moe_1b, tiny or tiny_moe. Default: what suits the device.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows of a step, on all devices together.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 0, "T. Default: the model's longest.")
REMAT = flags.DEFINE_string("remat", "", "What the backward pass computes again. Default: the model's.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps that are timed, after two that are not.")
PEAK = flags.DEFINE_float("peak", 0.0, "bfloat16 FLOP/s of one device, for those that PEAKS does not know.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")

DEFINITION = "MFU = model FLOPs of a step / (its seconds x devices x peak FLOP/s of one); arXiv 2204.02311, appendix B"
TARGET = 0.5  # dense, on a GPU
# Part of a device's name -> its dense bfloat16 peak, the makers' figures (those with sparsity halved).
PEAKS = {
  "H100 PCIe": 756e12,  # NVIDIA H100 datasheet
  "H100": 989e12,  # SXM; the same datasheet
  "H200": 989e12,  # NVIDIA H200 datasheet, SXM
  "A100": 312e12,  # NVIDIA A100 datasheet
}
TPUS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e"}  # -> chips of train/topology.py
MATMUL = 2048  # rows and columns of the product that measures a CPU's peak
# Threads of a trace whose events are the work, by platform; the others show the same time once more.
WORK = {"gpu": "Stream", "tpu": "XLA Ops", "cpu": "tf_XLA"}
WAITING = "ThunkExecutor", "SlinkyThreadPool"  # on a CPU: what lies around and between operations


def model_of(name: str) -> Any:
  """The ModelConfig of --model."""
  from tsparse.models.config import PRESETS, ModelConfig

  dense = ModelConfig(
    vocab_size=32_000,
    num_layers=16,
    d_model=2048,
    d_ff=8192,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=4096,
    activation="drelu",
    remat="full",
  )
  moe = {"num_experts": 8, "experts_per_token": 2, "d_ff": 4096}
  models = {
    "dense_1b": dense,
    "moe_1b": dataclasses.replace(dense, **moe),
    "tiny": dataclasses.replace(PRESETS["tiny"], max_seq_len=64),
    "tiny_moe": dataclasses.replace(PRESETS["tiny_moe"], max_seq_len=64),
  }
  if name not in models:
    raise UserError(f"--model={name} is unknown: choose one of {', '.join(models)}.")
  return dataclasses.replace(models[name], **({"remat": REMAT.value} if REMAT.value else {}))


def peak(device: Any) -> tuple[float, str]:
  """FLOP/s of one device at best, and where the figure is from."""
  from tsparse.train.topology import CHIPS

  if PEAK.value:
    return PEAK.value, "--peak"
  kind = device.device_kind
  for part, flops in PEAKS.items():
    if part in kind:
      return flops, f"{part}, as its maker says"
  for part, chip in TPUS.items():
    if part in kind:
      return CHIPS[chip].flops, f"{chip}, as its maker says"
  if device.platform == "cpu":
    return measured_peak(), "one large float32 product of matrices, just now"
  raise UserError(f"the peak of {kind} is not known: give it by --peak, in bfloat16 FLOP/s.")


def measured_peak() -> float:
  """FLOP/s of a product of square matrices, the best of 5."""
  import jax

  x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL))
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * MATMUL**3 / min(seconds)


def kernels(trace: Iterable[dict[str, Any]], platform: str) -> dict[str, float]:
  """Name -> seconds of its own (those of what it called taken off), the largest first, over all devices.

  Args:
    trace: the `traceEvents` of a trace.json.gz of jax.profiler.
    platform: a key of WORK.
  """
  names, lanes = {}, collections.defaultdict(list)
  for event in trace:
    if event.get("name") == "thread_name":
      names[event["pid"], event["tid"]] = event["args"]["name"]
    elif event.get("ph") == "X" and not event["name"].startswith(WAITING):
      lanes[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["name"]))
  own = collections.Counter()
  for lane, events in lanes.items():
    if not names.get(lane, "").startswith(WORK[platform]):
      continue
    open_until = []  # (end, name) of the events around this one
    for start, minus, name in sorted(events):
      while open_until and open_until[-1][0] <= start:
        open_until.pop()
      if open_until:
        own[open_until[-1][1]] += minus
      own[name] -= minus
      open_until.append((start - minus, name))
  return {name: microseconds / 1e6 for name, microseconds in own.most_common()}


def measure(name: str) -> dict[str, Any]:
  """The figures of one model."""
  import jax
  import numpy as np

  from configs import default
  from tsparse import sharding
  from tsparse.models.config import parameter_counts
  from tsparse.models.flops import training_flops
  from tsparse.train import loop

  model = model_of(name)
  seq_len, batch_size = SEQ_LEN.value or model.max_seq_len, BATCH_SIZE.value
  config = default.get_config()
  fields = dataclasses.asdict(model)
  config.activation = fields.pop("activation")
  config.model.update(fields)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    run = loop.prepare(config, mesh)
    state, _ = loop.initial_state(run, seed=0, init=None)
    ones = np.ones([batch_size, seq_len], np.int32)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, [2, *ones.shape]).astype(np.int32)
    positions = np.cumsum(ones, axis=1, dtype=np.int32) - 1
    rows = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": ones, "positions": positions}
    batch = sharding.place(rows, mesh)
    train_step = loop.compiled_step(run, config)

    def steps(count: int) -> float:
      nonlocal state
      start = time.perf_counter()
      for _ in range(count):
        state, metrics = train_step(state, batch)
      jax.block_until_ready((state, metrics))
      return time.perf_counter() - start

    steps(2)
    seconds = steps(STEPS.value) / STEPS.value
    device = jax.devices()[0]
    with tempfile.TemporaryDirectory(prefix="tsparse-mfu-") as folder:
      with jax.profiler.trace(folder):
        profiled = steps(1)
      (file,) = glob.glob(f"{folder}/plugins/profile/*/*.trace.json.gz")
      with gzip.open(file) as trace:
        own = kernels(json.load(trace)["traceEvents"], device.platform)
  flops = training_flops(model, ones.size, seq_len, 0.0)
  best, source = peak(device)
  busy = sum(own.values())
  return {
    "model": name,
    "device": f"{jax.device_count()} x {device.device_kind}",
    "dtype": model.dtype,
    "parameters": sum(parameter_counts(model).values()),
    "batch": list(ones.shape),
    "remat": model.remat,
    "seconds_per_step": seconds,
    "tokens_per_second": ones.size / seconds,
    "flops": {"model": flops["model"], "executed": flops["executed"]},
    "peak_flops": best,
    "peak_source": source,
    "mfu": flops["model"] / seconds / jax.device_count() / best,
    "profiled_seconds": profiled,
    "kernels": [{"name": kernel, "share": own[kernel] / busy} for kernel in list(own)[:5]],
    "definition": DEFINITION,
  }


def main():
  """Measures, prints, writes the JSON."""
  import jax

  on_cpu = jax.devices()[0].platform == "cpu"
  names = MODEL.value or (("tiny", "tiny_moe") if on_cpu else ("dense_1b", "moe_1b"))
  results = [measure(name) for name in names]
  for row in results:
    rows, seq_len = row["batch"]
    print(
      f"{row['model']}: {row['parameters'] / 1e9:.3f}B parameters, {row['dtype']}, {rows} x {seq_len} tokens, remat "
      f"{row['remat']}, {row['device']}\n"
      f"  MFU {row['mfu']:.1%}  {row['tokens_per_second']:,.0f} tokens/s  {row['seconds_per_step']:.3f} s/step  "
      f"{row['flops']['model']:.3e} FLOPs ({row['flops']['executed']:.3e} executed)\n"
      f"  peak {row['peak_flops']:.3e} FLOP/s: {row['peak_source']}"
    )
    for kernel in row["kernels"]:
      print(f"  {kernel['share']:6.1%}  {kernel['name'][:100]}")
  print(DEFINITION + ("; no accelerator was found: this says nothing of one" if on_cpu else f"; target {TARGET:.0%}"))
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"target": TARGET, "rows": results}))


if __name__ == "__main__":
  cli.script(main, __doc__)
