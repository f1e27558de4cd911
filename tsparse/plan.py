"""Whether an experiment fits on a slice of chips and what it costs there, by compiling its training step for it."""

import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from tsparse import files, sharding
from tsparse.check import check_sections, check_step
from tsparse.data.packing import KEYS
from tsparse.errors import RunFailure, UserError
from tsparse.models.config import model_config, parameter_counts
from tsparse.models.flops import FLOPS_DEFINITION, training_flops
from tsparse.train import topology
from tsparse.train.collectives import DEFINITION, collectives
from tsparse.train.loop import compiled_step, prepare

ROOFLINE_DEFINITION = (
  "seconds a step takes at least: compute = executed operations of a chip at its peak; memory = parameters and "
  "optimizer read and written once and, in every microbatch, a chip's part of the weights in the compute dtype read "
  "for the forward pass, for the backward pass (twice) and for remat, activations left out; network = bytes of the "
  "collectives (all-reduce counted twice) over all links of a chip at once. `overlapped` is the longest of the three, "
  "`one_after_another` their sum; real steps are slower than the first"
)
MEMORY_DEFINITION = (
  "bytes on one chip; `estimate` is our own count, `compiler` what the compiler laid out: arguments are parameters, "
  "optimizer and batch, temporaries are gradients, activations and everything else, not all at the same time; peak is "
  "the most that is held at a time (no figure of a real device where devices are virtual)"
)
OUT_OF_MEMORY = re.compile(r"Ran out of memory (?:on|in memory space) hbm[^\n]*", re.IGNORECASE)


def compile_step(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Compiles the training step of `config` for `mesh`, nothing allocated.

  Returns:
    seconds; then memory (bytes by part) and collectives, or out_of_memory, what the compiler says.

  Raises:
    RunFailure: the compiler refuses the step for another reason.
  """
  run = prepare(config, mesh)
  shape = config.train.batch_size, config.train.seq_len
  row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, sharding.spec("BT")))
  batch = {name: row for name in KEYS}
  start = time.monotonic()
  with jax.set_mesh(mesh):
    own = (run.teacher.own(run.own),) if run.teacher else ()
    lowered = compiled_step(run, config).lower(run.target, batch, *own)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if not (found := OUT_OF_MEMORY.search(str(error))):
        raise RunFailure(f"the step cannot be compiled: {str(error).strip().splitlines()[0]}") from error
      return {"seconds": time.monotonic() - start, "out_of_memory": found[0].strip().rstrip(".")}
  held = compiled.memory_analysis()
  return {
    "seconds": time.monotonic() - start,
    "memory": {
      "arguments": held.argument_size_in_bytes,
      "temporaries": held.temp_size_in_bytes,
      "peak": held.peak_memory_in_bytes,
    },
    "collectives": collectives(compiled.as_text()),
  }


def roofline(config: ml_collections.ConfigDict, chip: topology.Chip, facts: dict[str, Any]) -> dict[str, float]:
  """Seconds of a step. See ROOFLINE_DEFINITION.

  Args:
    config: the experiment.
    chip: its figures.
    facts: chips, flops, parameters, collectives, and memory.estimate, as `plan` gathers them.
  """
  shards = facts["mesh"]["tensor"] * facts["mesh"]["expert"]
  width = 2 if config.model.dtype == "bfloat16" else 4
  reads = config.train.microbatches * (3 + (config.model.remat == "full"))
  estimate = facts["memory"]["estimate"]
  moved = 2 * (estimate["parameters"] + estimate["optimizer"]) + reads * width * facts["parameters"] / shards
  sent = sum(sums["bytes"] * (1 + (kind == "all-reduce")) for kind, sums in facts["collectives"].items())
  parts = {
    "compute": facts["flops"]["executed"] / facts["chips"] / chip.flops,
    "memory": moved / chip.bandwidth,
    "network": sent / chip.interconnect,
  }
  return {**parts, "overlapped": max(parts.values()), "one_after_another": sum(parts.values())}


def plan(
  config: ml_collections.ConfigDict, name: str, zero_fraction: float, console: Console, compiling: bool = True
) -> dict[str, Any]:
  """Everything that is known of `config` on the topology `name`, as it is written to JSON.

  With `compiling` off, or for TPUs where libtpu is not installed, memory is estimated.

  Raises:
    UserError: the topology is unknown, or the config cannot run on it at all.
  """
  check_sections(config)
  if not 0 <= zero_fraction <= 1:
    raise UserError(f"--zero_fraction={zero_fraction}: it is a share, 0 to 1.")
  kind, _ = topology.parse(name)
  devices, compilable = topology.devices(name)
  missing = "" if compilable else "libtpu is not installed (pip install -r requirements-tpu.txt)"
  why = missing if compiling else "--nocompile"  # there is only an estimate
  mesh = sharding.make_mesh(config.mesh, devices)
  platform = "tpu" if kind in topology.CHIPS else kind
  estimate = check_step(config, mesh, platform)
  model, settings, chip = model_config(config), config.train, topology.CHIPS.get(kind)
  tokens = settings.batch_size * settings.seq_len
  result = {
    "config": config.name,
    "topology": name,
    "chips": len(devices),
    "mesh": dict(mesh.shape),
    "microbatches": settings.microbatches,
    "parameters": sum(parameter_counts(model).values()),
    "tokens_per_step": tokens,
    "steps": settings.steps,
    "zero_fraction": zero_fraction,
    "flops": training_flops(model, tokens, settings.seq_len, zero_fraction, platform),
    "memory": {"estimate": estimate, "chip": chip and chip.memory},
    "source": f"estimate: {why}" if why else "compiler",
    "definitions": {
      "memory": MEMORY_DEFINITION, "flops": FLOPS_DEFINITION, "collectives": DEFINITION, "roofline": ROOFLINE_DEFINITION
    },
  }  # fmt: skip
  if not why:
    title = f"compiling {config.name} for {name} ({len(devices)} chips), 1 to 3 minutes"
    console.print(title, highlight=False)
    with console.status("compiling"):
      compiled = compile_step(config, mesh)
    result["compile_seconds"] = compiled["seconds"]
    result["memory"]["compiler"] = compiled.get("memory")
    result["out_of_memory"] = compiled.get("out_of_memory")
    result["collectives"] = compiled.get("collectives")
    result["fits"] = "out_of_memory" not in compiled if chip else None
  else:
    result["fits"] = sum(estimate.values()) <= chip.memory if chip else None
  if chip and result["fits"] and not why:
    seconds = roofline(config, chip, result)
    result["roofline"] = seconds
    result["tokens_per_second"] = tokens / seconds["overlapped"]
    result["days"] = seconds["overlapped"] * settings.steps / 86_400
  return result


def advice(result: dict[str, Any], remat: str) -> str:
  """What to change where it does not fit."""
  memory, data = result["memory"], result["mesh"]["data"]
  held = sum(memory["estimate"].values()) - memory["estimate"]["activations"]
  if held > memory["chip"]:  # smaller microbatches would not help
    return ", or ".join(["set --config.mesh.data=1 --config.mesh.fsdp=-1"] * (data > 1) + ["take a larger slice"])
  rows = "raise --config.train.microbatches (activations)"
  return ", or ".join(
    [rows]
    + ["set --config.model.remat=full (activations)"] * (remat != "full")
    + ["raise --config.mesh.tensor, which splits activations too", "take a larger slice"]
  )


def rows(result: dict[str, Any], remat: str) -> list[tuple[str, str]]:
  """The lines of the table that is printed: label and value."""
  memory, flops = result["memory"], result["flops"]
  lines = [
    ("chips, mesh", f"{result['chips']}, " + " ".join(f"{k}={v}" for k, v in result["mesh"].items())),
    ("parameters", f"{result['parameters'] / 1e9:,.3f} B"),
    ("tokens per step, steps", f"{result['tokens_per_step']:,} in {result['microbatches']} microbatches, "
                               f"{result['steps']:,}"),
    *((f"{part} per chip (estimate)", decimal(size)) for part, size in memory["estimate"].items()),
    *((f"{part} per chip (compiler)", decimal(size)) for part, size in (memory.get("compiler") or {}).items()),
    *([("memory of a chip", decimal(int(memory["chip"])))] if memory["chip"] else []),
    *((f"{kind} per step and chip", f"{sums['count']:,} x, {decimal(sums['bytes'])}")
      for kind, sums in (result.get("collectives") or {}).items()),
    *((f"operations per step, {name}", f"{count:.3e}") for name, count in flops.items()),
  ]  # fmt: skip
  if "roofline" in result:
    seconds = result["roofline"]
    parts = ", ".join(f"{name} {seconds[name]:,.2f}" for name in ("compute", "memory", "network"))
    lines += [
      ("seconds per step, at least", f"{seconds['overlapped']:,.2f} ({parts}; "
                                     f"one after another {seconds['one_after_another']:,.2f})"),
      ("tokens per second, at most", f"{result['tokens_per_second']:,.0f}"),
      ("days for all steps, at least", f"{result['days']:,.1f}"),
    ]  # fmt: skip
  verdict = {True: "yes", None: "unknown: there is no limit for virtual devices"}.get(result["fits"])
  said = result.get("out_of_memory")
  reason = f"the compiler says {said!r}" if said else f"{decimal(sum(memory['estimate'].values()))} are estimated"
  return [*lines, ("source", result["source"]), ("fits", verdict or f"no: {reason}; {advice(result, remat)}")]


def run(config: ml_collections.ConfigDict, name: str, zero_fraction: float, out: Path, compiling: bool = True):
  """Plans, prints the table and writes the JSON file `out`."""
  console = Console()
  result = plan(config, name, zero_fraction, console, compiling)
  table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False, title_justify="left")
  for label, value in rows(result, config.model.remat):
    table.add_row(label, value)
  console.print(table, highlight=False)
  out.parent.mkdir(parents=True, exist_ok=True)
  files.write(out, files.to_json(result))
  console.print(f"plan  {out}", highlight=False, soft_wrap=True)
