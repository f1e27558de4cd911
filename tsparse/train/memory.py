"""Bytes a training step needs per device, estimated before anything is allocated, and what the machine has."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tsparse.errors import UserError
from tsparse.models.attention import has_kernel, make_rule
from tsparse.models.config import ModelConfig
from tsparse.models.loss import BLOCKS
from tsparse.train.step import TrainState


def activation_bytes(
  model: ModelConfig, tokens: int, seq_len: int, platform: str, tensor: int = 1, expert: int = 1
) -> int:
  """Activations of the forward and backward pass over `tokens` tokens on one device, an estimate.

  Counted: what each layer keeps for the backward pass (with remat "full" its input only), the working set of one layer
  (projections, attention scores or, of a kernel, their log-sums, the hidden of the experts a token is routed to, or of
  all with moe_impl "dense"), and one block of the logits with its gradient in float32. XLA's fusions and temporaries
  make the true figure differ by some tens of percent.

  Args:
    model: the model.
    tokens: of one microbatch on one device.
    seq_len: T.
    platform: tpu, cuda or cpu, whose attention is used.
    tensor: devices that share heads, neurons and vocabulary.
    expert: devices that share the experts; with "ep_allgather" and "ep_ragged_a2a" each has room for all tokens of all
      of them, as often as they can be sent there (models/dispatch.py).
  """
  width = 2 if model.dtype == "bfloat16" else 4
  s = model.sizes
  experts = max(1, model.num_experts if model.moe_impl == "dense" else model.experts_per_token)
  if expert > 1 and model.moe_impl.startswith("ep_"):
    rooms, experts = expert, min(experts, model.num_experts // expert)
  else:
    rooms = 1
  projections = (4 * s["D"] + 2 * s["H"] * (s["N"] + s["K"]) // tensor) * width
  rules = {
    make_rule(seq_len, s["H"], window, 0, model.attention_softcap, model.attention_impl) for window in model.windows
  }
  held = all(has_kernel(platform, rule, model.dtype) for rule in rules)
  # float32 scores and the weights that meet the values, or the log-sum of a kernel, a register's row for each
  scores = s["N"] // tensor * (4 * 128 if held else seq_len * (4 + width))
  neurons = max(experts * s["F"] * rooms + model.num_shared_experts * model.shared_d_ff, model.dense_d_ff)
  hidden = (3 + bool(model.predictor_ranks)) * neurons // tensor * width  # gate, up, hidden, and the predictor's mask
  slots = 2 * experts * rooms * s["D"] * width if model.num_experts else 0  # inputs and outputs of the experts
  kept = s["D"] * width if model.remat == "full" else projections + hidden + slots
  working = 2 * (projections + scores + hidden + slots)
  logits = 2 * 4 * s["V"] // BLOCKS // tensor
  return tokens * (model.num_layers * kept + working + logits)


def training_bytes(
  model: ModelConfig,
  target: TrainState,
  rows: int,
  seq_len: int,
  platform: str,
  mesh: Mapping[str, int],
  teacher: Any = None,
) -> dict[str, int]:
  """Bytes per device: parameters, gradients, optimizer (exact, from their shardings) and activations (estimated).

  Args:
    model: the model.
    target: abstract state with shardings.
    rows: rows of one microbatch on one device.
    seq_len: T.
    platform: see `activation_bytes`.
    mesh: length of each of its axes.
    teacher: what a teacher alone holds, abstract with shardings; its activations are those of no backward pass, and not
      counted.
  """

  def held(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))

  parameters = held(target.params)
  return {
    "parameters": parameters,
    "gradients": parameters,
    "optimizer": held(target.opt_state),
    "activations": activation_bytes(model, rows * seq_len, seq_len, platform, mesh["tensor"], mesh["expert"]),
  } | ({"teacher": held(teacher)} if teacher is not None else {})


def device_bytes(devices: list[jax.Device]) -> int:
  """Memory that one device may use: the accelerator's limit, or its share of this machine's available memory."""
  stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
  available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
  limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit
  if limit.exists() and limit.read_text().strip().isdigit():
    available.append(int(limit.read_text()))
  return min(available, default=2**63) // len(devices)


def check_fits(needed: dict[str, int], available: int, name: str, smaller: str, remat: str):
  """Raises UserError with all figures, and what can be done, when `needed` bytes per device exceed `available`."""
  total = sum(needed.values())
  if total <= available:
    return
  figures = ", ".join(f"{part} {count / 1e9:,.1f} GB" for part, count in needed.items())
  held = total - needed["activations"]
  advice = [
    "use more devices (--config.mesh.fsdp=-1 splits everything over all of them)",
    "raise --config.train.microbatches (activations)" if held < available else "",
    "set --config.model.remat=full (activations)" if held < available and remat != "full" else "",
    f"try --config={smaller}" if smaller else "",
  ]
  device = jax.devices()[0].platform
  raise UserError(
    f"{name} does not fit: one device needs about {total / 1e9:,.1f} GB ({figures}) and this machine has "
    f"{jax.device_count()} {device} device{'s' * (jax.device_count() > 1)} with {available / 1e9:,.1f} GB each; "
    f"{', or '.join(filter(None, advice))}."
  )
