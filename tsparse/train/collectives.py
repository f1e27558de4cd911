"""What a compiled program sends between devices, read from its HLO text."""

import functools
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
DEFINITION = (
  "collectives a device takes part in during one step, loops multiplied by their trip counts, of branches the one that "
  "sends most, and the bytes of their results on that device; of a ragged-all-to-all the whole buffer, the most that "
  "may arrive; of a TPU's all-reduce-scatter, which is counted as reduce-scatter, those of its operand"
)
BITS = {"pred": 8, "bf16": 16}  # of types whose name does not end in their width

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
CALL = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=)(.*?)(?:\}|,? metadata|$)")
NAME = re.compile(r"(?:false_computation=)?%?([\w.-]+)")
KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
ORIGIN = re.compile(r"(channel_id=\d+)(?:.*(metadata=\{[^}]*\}))?")
COMPARED = re.compile(r"constant\((\d+)\)")


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """Count and bytes by kind of a program's collectives. See DEFINITION.

  Args:
    hlo: `compiled.as_text()`.

  Raises:
    ValueError: the trip count of a loop with collectives cannot be read.
  """
  bodies, entry, name = {}, "", ""
  for line in hlo.splitlines():
    if head := COMPUTATION.match(line):
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif name:
      bodies[name].append(line)

  @functools.cache
  def inside(name: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, identity) -> times and bytes of each; the TPU's asynchronous fusions repeat a collective in every part.

    Its channel and where it comes from tell it from others: those of a shard_map have one channel in common.
    """
    sums = {}
    for number, line in enumerate(bodies.get(name, ())):
      if found := COLLECTIVE.search(line):
        shapes, kind, start = found.groups()
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        origin = ORIGIN.search(line)
        size = result_bytes(shapes, halves=bool(start) and found[2] != "all-reduce")
        parts = {(kind, " ".join(filter(None, origin.groups())) if origin else f"{name} {number}"): (1, size)}
      elif loop := WHILE.search(line):
        parts = inside(loop[2])
        trips = trip_count(line, bodies[loop[1]]) if parts else 0
        parts = {key: (trips * times, size) for key, (times, size) in parts.items()}
      elif branches := BRANCHES.search(line):
        of_each = [inside(branch) for branch in NAME.findall(branches[1])]
        parts = max(of_each, key=lambda parts: sum(times * size for times, size in parts.values()))
      else:
        parts = {key: value for called in CALL.findall(line) for key, value in inside(called).items()}
      for key, value in parts.items():
        sums[key] = max(value, sums.get(key, value))
    return sums

  result = {}
  for (kind, _), (times, size) in inside(entry).items():
    sums = result.setdefault(kind, {"count": 0, "bytes": 0})
    sums["count"] += times
    sums["bytes"] += times * size
  return result


def trip_count(line: str, condition: list[str]) -> int:
  """How often a while loop runs: as its line says, or the one constant its condition compares with from 0 on."""
  if known := KNOWN_TRIPS.search(line):
    return int(known[1])
  constants = [int(found[1]) for found in map(COMPARED.search, condition) if found]
  if len(constants) != 1 or not any("direction=LT" in text for text in condition):
    raise ValueError(f"the trip count of this loop cannot be read: {line.strip()[:200]}")
  return constants[0]


def result_bytes(shapes: str, halves: bool) -> int:
  """Bytes of an HLO result such as `(bf16[8,4]{1,0}, f32[2])`; `halves`: operands come first, as in `-start` forms."""
  arrays = [(kind, dims) for kind, dims in ARRAY.findall(shapes) if dims or not halves]
  arrays = arrays[len(arrays) // 2 :] if halves else arrays
  bits = (
    math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(kind, int(re.sub(r"\D", "", kind) or 8))
    for kind, dims in arrays
  )
  return sum(bits) // 8
