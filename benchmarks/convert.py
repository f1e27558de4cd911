"""Converts a synthetic bfloat16 checkpoint from Hugging Face to ours and back: time, memory, and that no bit changed.

python benchmarks/convert.py                     (mistral_7b: 14.5 GB; 7 minutes; needs 45 GB of disk, all given back)
python benchmarks/convert.py --preset=300m

On 2 CPU cores, mistral_7b:

                        seconds   MB/s  peak GiB  limit GiB
plain copy                 21.9    663      0.02       5.50
Hugging Face to ours       60.7    238      1.02       5.50
ours to Hugging Face       59.8    242      1.24       5.50
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from tsparse import cli
from tsparse.errors import RunFailure, UserError

PRESET = flags.DEFINE_string("preset", "mistral_7b", "A model of tsparse.models.config.PRESETS.")
FOLDER = flags.DEFINE_string("folder", tempfile.gettempdir(), "Where the checkpoints are, for as long as it takes.")
STAGE = flags.DEFINE_string(
  "stage", "", "make or compare: a part of this, in a process of its own. Default: all of it."
)
GIB = 1024**3


def make(folder: Path, preset: str):
  """Writes folder/theirs, a Hugging Face directory of random weights, and folder/sizes.json; holds one tensor's size.

  Args:
    folder: exists.
    preset: its architecture.
  """
  import jax.numpy as jnp
  import numpy as np

  from tsparse import files
  from tsparse.convert import huggingface, rules
  from tsparse.convert.families import export_format
  from tsparse.convert.leaf import Leaf
  from tsparse.models.config import PRESETS

  if preset not in PRESETS:
    raise UserError(f"--preset={preset} is unknown: choose one of {', '.join(PRESETS)}.")
  config = PRESETS[preset]
  fields, mapping, modeling = export_format(config, "bfloat16")
  shapes = {
    name: rules.shape(rule.pattern.split(" -> ")[0], rules.sizes(rule, config, index))
    for rule in mapping
    for index, name in rules.sources(rule, config)
  }
  counts = {name: int(np.prod(shape)) for name, shape in shapes.items()}
  # Tensors are windows of one pool of numbers, each at its own place: random ones for all would take longer than the
  # conversion.
  pool = np.random.default_rng(0).standard_normal(max(counts.values()) + 2 * len(counts), np.float32)
  pool = (pool * 0.02).astype(jnp.bfloat16)

  def window(i: int, name: str) -> Leaf:
    return Leaf(shapes[name], pool.dtype, 0, lambda _: pool[2 * i : 2 * i + counts[name]].reshape(shapes[name]))

  tensors = {name: window(i, name) for i, name in enumerate(shapes)}
  (folder / "theirs").mkdir()
  huggingface.write_directory(folder / "theirs", fields, tensors, modeling)
  stacked = [sum(2 * counts[name] for _, name in rules.sources(rule, config)) for rule in mapping]
  files.write(folder / "sizes.json", files.to_json({"total": sum(stacked), "largest": max(stacked)}))


def compare(folder: Path):
  """Raises RunFailure unless the tensors of folder/theirs and folder/back are the same, bit for bit."""
  from tsparse.convert.huggingface import Directory

  theirs, back = Directory(folder / "theirs"), Directory(folder / "back")
  if theirs.names != back.names:
    raise RunFailure(f"other tensors came back: {sorted(theirs.names ^ back.names)[:8]}.")
  for name in sorted(theirs.names):
    before, after = theirs.read(name), back.read(name)
    if before.dtype != after.dtype or before.shape != after.shape or before.tobytes() != after.tobytes():
      raise RunFailure(f"tensor {name} came back changed.")
  print(f"{len(theirs.names)} tensors came back as they were, bit for bit", flush=True)


def timed(command: list[str]) -> tuple[float, float]:
  """Runs a command -> (seconds until its files are on the disk, peak memory in bytes, as /usr/bin/time says it)."""
  start = time.monotonic()
  process = subprocess.Popen(command)
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RunFailure(f"{' '.join(command)} ended with exit code {process.returncode}.")
  os.sync()
  return time.monotonic() - start, usage.ru_maxrss * 1024


def main():
  """Makes, copies, converts twice, compares, prints a table; this process stays small, as its memory would count."""
  if STAGE.value:
    folder = Path(FOLDER.value)
    return make(folder, PRESET.value) if STAGE.value == "make" else compare(folder)
  with tempfile.TemporaryDirectory(prefix="tsparse-convert-", dir=FOLDER.value) as name:
    folder = Path(name)
    this = [sys.executable, __file__, f"--folder={folder}", f"--preset={PRESET.value}"]
    convert = [sys.executable, str(ROOT / "experiments" / "convert.py")]
    timed([*this, "--stage=make"])
    sizes = json.loads((folder / "sizes.json").read_text())
    limit = sizes["largest"] + 2 * GIB
    rows = [("plain copy", *timed(["cp", "-r", str(folder / "theirs"), str(folder / "copy")]))]
    shutil.rmtree(folder / "copy")
    for title, source, target, form in (
      ("Hugging Face to ours", "theirs", "ours", "tsparse"),
      ("ours to Hugging Face", "ours", "back", "hf"),
    ):
      arguments = [f"--model={folder / source}", f"--out={folder / target}", f"--format={form}"]
      rows.append((title, *timed([*convert, *arguments])))
    timed([*this, "--stage=compare"])
  print(f"{PRESET.value}: {sizes['total'] / 1e9:.2f} GB, the largest parameter {sizes['largest'] / GIB:.2f} GiB")
  print(f"{'':22}{'seconds':>9}{'MB/s':>7}{'peak GiB':>10}{'limit GiB':>11}")
  for title, seconds, peak in rows:
    print(f"{title:22}{seconds:9.1f}{sizes['total'] / seconds / 1e6:7.0f}{peak / GIB:10.2f}{limit / GIB:11.2f}")
  over = [title for title, _, peak in rows if peak > limit]
  if over:
    raise RunFailure(f"{' and '.join(over)}: over the limit of memory, the largest parameter + 2 GiB.")


if __name__ == "__main__":
  cli.script(main, __doc__)
