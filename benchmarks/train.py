"""Tokens per second of a training step, over transformers and torch training the same model on this CPU.

python benchmarks/train.py
python benchmarks/train.py --size=L4,D128,F512,N4,K2,H32,V264,T128,B16 --repeats=20 --json=train.json
"""

import dataclasses
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli, files
from tsparse.errors import RunFailure, UserError

SIZES = ("L4,D128,F512,N4,K2,H32,V264,T128,B16", "L8,D512,F1536,N8,K4,H64,V8192,T512,B4")  # the demo's; a wider one
SIZE = flags.DEFINE_multi_string("size", SIZES, "Axis letters with their lengths. May be repeated.")
EXPERTS = flags.DEFINE_integer("experts", 8, "E of the MoE, of which a token meets 2, each with F / 2 neurons.")
REMAT = flags.DEFINE_string("remat", "none", "Ours: what the backward pass computes again (config.model.remat).")
THREADS = flags.DEFINE_integer("threads", 2, "Of each side: it is pinned to so many cores.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Steps of each side, one by one in turns; the least time counts.")
JSON = flags.DEFINE_string("json", "", "Where the same figures are written.")
TOLERANCE = 1e-4  # relative, of the first step's loss and gradient norm
MATMUL = 2048  # rows and columns of the product that measures the peak
LEARNING_RATE = 1e-3
# glibc keeps what a step frees, in huge pages: new pages are slow, and how slow depends on the machine's history. Ours
# has the first in experiments/run.py too.
KEPT_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"


def model_of(size: str, experts: int, remat: str) -> tuple[Any, int, int]:
  """ModelConfig of one of --size, T and B."""
  from tsparse.models.config import ModelConfig

  lengths = {letter: int(number) for letter, number in re.findall(r"([A-Z])(\d+)", size)}
  if set(lengths) != set("LDFNKHVTB"):
    raise UserError(f"--size={size}: give each of the letters L D F N K H V T B its length, as in {SIZES[0]}.")
  moe = {"num_experts": experts, "experts_per_token": 2} if experts else {}
  config = ModelConfig(
    num_layers=lengths["L"],
    d_model=lengths["D"],
    d_ff=lengths["F"] // (2 if experts else 1),
    num_heads=lengths["N"],
    num_kv_heads=lengths["K"],
    head_dim=lengths["H"],
    vocab_size=lengths["V"],
    max_seq_len=lengths["T"],
    dtype="float32",
    remat=remat,
    **moe,
  )
  return config, lengths["T"], lengths["B"]


def tokens(config: Any, seq_len: int, batch_size: int) -> Any:
  """Random inputs and targets, [B, T] each."""
  import numpy as np

  return np.random.default_rng(0).integers(0, config.vocab_size, [2, batch_size, seq_len]).astype(np.int32)


def ours(config: Any, seq_len: int, batch_size: int, folder: Path) -> tuple[Callable, Callable]:
  """Our side: (one step -> loss, gradient norm), (one product of matrices); writes the parameters to `folder`."""
  import jax
  import numpy as np

  from configs import default
  from tsparse import sharding
  from tsparse.convert import huggingface, rules
  from tsparse.convert.families import export_format
  from tsparse.convert.leaf import Leaf
  from tsparse.train import loop
  from tsparse.train.allocator import keep_freed_memory

  keep_freed_memory()  # as experiments/run.py does
  experiment = default.get_config()
  fields = dataclasses.asdict(config)
  experiment.activation = fields.pop("activation")
  experiment.model.update(fields)
  settings = experiment.train
  settings.update({"learning_rate": LEARNING_RATE, "warmup_steps": 0, "final_learning_rate_fraction": 1.0})
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1))
  jax.set_mesh(mesh)
  run = loop.prepare(experiment, mesh)
  state, _ = loop.initial_state(run, seed=0, init=None)

  def leaf(x):
    x = np.asarray(x)
    return Leaf(x.shape, x.dtype, 0, lambda _: x)

  parameters = {sharding.path_name(path): leaf(x) for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
  fields, mapping, modeling = export_format(config, "float32")
  huggingface.write_directory(folder, fields, rules.to_theirs(mapping, config, parameters), modeling)

  inputs, targets = tokens(config, seq_len, batch_size)
  ones = np.ones_like(inputs)
  rows = {"inputs": inputs, "targets": targets, "segment_ids": ones, "positions": np.cumsum(ones, axis=1) - 1}
  batch = sharding.place({name: x.astype(np.int32) for name, x in rows.items()}, mesh)
  train_step = loop.compiled_step(run, experiment)
  left = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL))
  product = jax.jit(lambda x: x @ x)

  def step():
    nonlocal state
    state, metrics = train_step(state, batch)
    return float(metrics["loss"]), float(metrics["grad_norm"])

  return step, lambda: product(left).block_until_ready()


def theirs(config: Any, seq_len: int, batch_size: int, folder: Path) -> tuple[Callable, Callable]:
  """The other side, as `ours`, with the parameters of `folder`."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
  model.train()
  settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
  optimizer = torch.optim.AdamW(model.parameters(), **settings)
  inputs, targets = (torch.from_numpy(x).long() for x in tokens(config, seq_len, batch_size))
  left = torch.randn(MATMUL, MATMUL)

  def step():
    optimizer.zero_grad()
    logits = model(input_ids=inputs, use_cache=False).logits  # [B, T, V]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item()

  return step, lambda: left @ left


def serve(side: Callable, threads: int, connection: Any):
  """A process of one side: makes what it is given the arguments of; times a "step" or a "product"; ends at None."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  import numpy as np

  os.environ |= {"OMP_NUM_THREADS": str(threads), "NPROC": str(threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
  functions = {}
  while asked := connection.recv():
    start, used, result = time.perf_counter(), time.process_time(), None
    if isinstance(asked, tuple):
      functions = dict(zip(("step", "product"), side(*asked), strict=True))
    else:
      result = functions[asked]()
    seconds = time.perf_counter() - start, time.process_time() - used
    connection.send((result if asked == "step" else None, np.array(seconds)))


class Side:
  """One side, in a process of its own."""

  def __init__(self, side: Callable):
    spawn = multiprocessing.get_context("spawn")
    self._connection, end = spawn.Pipe()
    self._process = spawn.Process(target=serve, args=(side, THREADS.value, end), daemon=True)
    self._process.start()
    end.close()

  def ask(self, what: Any) -> tuple[Any, Any]:
    """The result of what `serve` understands, and its seconds: by the clock, and of all cores."""
    try:
      self._connection.send(what)
      return self._connection.recv()
    except (EOFError, BrokenPipeError):
      raise RunFailure("one side ended, and says above why.") from None

  def close(self):
    """Ends the process."""
    self._connection.send(None)
    self._process.join()


def measure(size: str, experts: int, sides: dict[str, Side]) -> dict[str, Any]:
  """One row of the table: both sides on one model, step by step in turns."""
  from tsparse.models.flops import training_flops

  config, seq_len, batch_size = model_of(size, experts, REMAT.value)
  count = seq_len * batch_size
  flops = training_flops(config, count, seq_len, 0.0)
  with tempfile.TemporaryDirectory(prefix="tsparse-train-") as folder:
    for side in sides.values():  # the second reads what the first has written
      side.ask((config, seq_len, batch_size, Path(folder)))
  first = {name: side.ask("step")[0] for name, side in sides.items()}
  for what, mine, other in zip(("loss", "gradient norm"), first["ours"], first["theirs"], strict=True):
    if abs(mine - other) > TOLERANCE * abs(other):
      raise RunFailure(f"the first step's {what} is {mine} here and {other} there: this is not the same work.")
  seconds = {(name, what): [] for what in ("step", "product") for name in sides}
  for _ in range(REPEATS.value):
    for name, what in seconds:
      seconds[name, what].append(sides[name].ask(what)[1])
  least = {key: [min(column) for column in zip(*pairs, strict=True)] for key, pairs in seconds.items()}
  peak = 2 * MATMUL**3 / min(least[name, "product"][0] for name in sides)
  speed = {name: count / least[name, "step"][0] for name in sides}
  return {
    "model": f"{experts} experts" if experts else "dense",
    "size": size,
    "loss": first["ours"][0],
    "tokens_per_second": speed,
    "ratio": speed["ours"] / speed["theirs"],
    "core_ratio": least["theirs", "step"][1] / least["ours", "step"][1],
    "peak_flops": peak,
    "limit_tokens_per_second": peak / (flops["model"] / count),
    "executed_over_model": flops["executed"] / flops["model"],
  }


def main():
  """Measures, prints the table, writes the JSON."""
  for size in SIZE.value:
    model_of(size, EXPERTS.value, REMAT.value)  # a UserError comes before anything is started
  os.environ.setdefault("GLIBC_TUNABLES", KEPT_PAGES)  # of both sides
  sides = {"ours": Side(ours), "theirs": Side(theirs)}
  rows = [measure(size, experts, sides) for size in SIZE.value for experts in (0, EXPERTS.value)]
  for side in sides.values():
    side.close()
  print(f"float32, {THREADS.value} threads each, remat {REMAT.value}; tokens/s of the fastest of {REPEATS.value} steps")
  print(f"{'':12}{'torch':>9}{'tsparse':>9}{'ratio':>7}{'cores':>7}{'limit':>9}  size")
  for row in rows:
    speed = row["tokens_per_second"]
    print(
      f"{row['model']:12}{speed['theirs']:9,.0f}{speed['ours']:9,.0f}{row['ratio']:7.2f}"
      f"{row['core_ratio']:7.2f}{row['limit_tokens_per_second']:9,.0f}  {row['size']}"
    )
  print("ratio: of tokens/s; cores: of tokens for each second of a core, which another load on the machine spares")
  peaks = ", ".join(f"{row['peak_flops'] / 1e9:.0f}" for row in rows)
  print(
    "limit: tokens/s if all operations of the model (models/flops.py, nothing twice) were as fast as one large product "
    f"of matrices in the same run, GFLOP/s by row: {peaks}"
  )
  if JSON.value:
    Path(JSON.value).write_text(files.to_json({"threads": THREADS.value, "remat": REMAT.value, "rows": rows}))


if __name__ == "__main__":
  cli.script(main, __doc__)
