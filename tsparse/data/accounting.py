"""What a run has drawn from each source: summed over lanes, from positions in the data alone."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DEFINITIONS = {
  "data_tokens": "tokens of a source that were drawn to be trained on, end-of-text tokens included; its share is of "
  "those of all sources, and its target the weight it was given; of conversations all tokens count, though the loss is "
  "of the assistant's alone",
  "data_epochs": "documents of a source that were drawn, over the documents it has to train on",
  "data_fill": "share of the places of training rows that hold a token; a document is cut at the end of a row and goes "
  "on in the next, so that none is lost: nothing is padded and nothing truncated",
}


def pack(value: Mapping[str, Any]) -> bytes:
  """JSON, compressed: how positions are kept."""
  return zlib.compress(json.dumps(value).encode())


def unpack(packed: bytes) -> dict[str, Any]:
  """What `pack` packed; ValueError or zlib.error where it is not that."""
  return json.loads(zlib.decompress(packed))


def merge_positions(positions: Iterable[bytes]) -> bytes:
  """The position of all lanes, from those of hosts that each have some; lanes that several have are the same."""
  first, *others = positions
  if not others:
    return first
  whole = unpack(first)
  for position in others:
    whole["lanes"] |= unpack(position)["lanes"]
  return pack(whole)


def accounts(sources: Sequence[Mapping[str, Any]], lanes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """One dict for each source: name, category, tokens, share, target, documents, epochs, skipped and malformed lines.

  Args:
    sources: what a position says of them: `name`, `category`, `target`, `documents` (None: unknown), `skipped`, `bad`.
    lanes: with the tokens `drawn` and the documents `taken` of each source.
  """
  lanes = list(lanes)
  tokens = [sum(each) for each in zip(*(lane["drawn"] for lane in lanes), strict=True)]
  taken = [sum(each) for each in zip(*(lane["taken"] for lane in lanes), strict=True)]
  total = sum(tokens)
  return [
    {
      "name": source["name"],
      "category": source["category"],
      "tokens": drawn,
      "share": drawn / total if total else 0.0,
      "target": source["target"],
      "documents": documents,
      "epochs": documents / source["documents"] if source["documents"] else None,
      "skipped": source["skipped"],
      "malformed": source["bad"],
    }
    for source, drawn, documents in zip(sources, tokens, taken, strict=True)
  ]


def accounts_at(position: bytes) -> list[dict[str, Any]]:
  """`accounts` of a whole position, as a checkpoint holds it."""
  found = unpack(position)
  return accounts(found["sources"], found["lanes"].values())


def account_metrics(tallies: Iterable[bytes]) -> dict[str, float]:
  """What is logged of the `tally` of every host: data/SOURCE/{tokens,share,target,epochs} and data/fill."""
  found = [json.loads(tally) for tally in tallies]
  lanes = {}
  for tally in found:
    lanes |= tally["lanes"]
  metrics = {"data/fill": sum(t["filled"] for t in found) / max(1, sum(t["places"] for t in found))}
  for account in accounts(found[0]["sources"], lanes.values()):
    for key in ("tokens", "share", "target", "epochs"):
      if account[key] is not None:
        metrics[f"data/{account['name']}/{key}"] = account[key]
  return metrics
