"""What a compiled program sends between devices, read from its HLO text."""

import functools
import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
DEFINITION = (
  "collectives a device takes part in during one step, loops multiplied by their trip counts, and the bytes of their "
  "results on that device"
)
BITS = {"pred": 8, "bf16": 16}  # of types whose name does not end in their width

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
CALL = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
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
  def total(name: str) -> Counter:
    sums = Counter()
    for line in bodies.get(name, ()):
      if found := COLLECTIVE.search(line):
        shapes, kind, start = found.groups()
        sums[kind, "count"] += 1
        sums[kind, "bytes"] += result_bytes(shapes, halves=bool(start) and kind != "all-reduce")
      elif loop := WHILE.search(line):
        if inner := total(loop[2]):
          trips = trip_count(line, bodies[loop[1]])
          sums.update({key: trips * value for key, value in inner.items()})
      else:
        for called in CALL.findall(line):
          sums.update(total(called))
    return sums

  sums = total(entry)
  return {kind: {"count": sums[kind, "count"], "bytes": sums[kind, "bytes"]} for kind in KINDS if sums[kind, "count"]}


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
