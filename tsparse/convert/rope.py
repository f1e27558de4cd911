"""Rotary positions in a config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5."""

from collections.abc import Mapping
from typing import Any

from tsparse.errors import UserError
from tsparse.models.config import ModelConfig
from tsparse.models.rope import SCALINGS, parse_scaling

ORIGINAL = "original_max_position_embeddings"


def read_rope(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
  """Our fields rope_theta and rope_scaling of a config.json.

  As in transformers, the base is the one among the parameters before the one beside them, nulls are as good as absent,
  and an original length that is left out is max_position_embeddings.

  Args:
    fields: of config.json, in either layout.
    theta: the base where config.json leaves it out.

  Raises:
    UserError: the type, one of its keys or a value is not supported; they are named.
  """
  held = {name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name)}
  name, rope = next(iter(held.items()), ("rope_parameters", {}))

  def refuse(reason: str):
    raise UserError(f"config.json: {name} = {rope} is not supported ({reason}).")

  if len(held) > 1:
    refuse("rope_parameters is there too, and only one of them can hold")
  if not isinstance(rope, Mapping):
    refuse("it should be an object")
  theta = rope.get("rope_theta", fields.get("rope_theta", theta))
  if not isinstance(theta, (int, float)):
    refuse(f"rope_theta {theta!r} is not a number")
  kind = rope.get("rope_type", rope.get("type", "default"))
  numbers = {
    key: value
    for key, value in rope.items()
    if key not in ("rope_theta", "rope_type") and value is not None and not (key == "type" and value == kind)
  }
  if kind == "default":
    if numbers:
      refuse(f"plain rotary positions take no {', '.join(numbers)}")
    return {"rope_theta": float(theta), "rope_scaling": ""}
  if not isinstance(kind, str) or kind not in SCALINGS:
    refuse(f"of the types only default, {', '.join(SCALINGS)} are")
  wrong = {key: value for key, value in numbers.items() if not isinstance(value, (int, float))}
  if wrong:
    refuse(f"{wrong} should be numbers")
  if ORIGINAL in SCALINGS[kind][1] and fields.get("max_position_embeddings"):
    numbers.setdefault(ORIGINAL, fields["max_position_embeddings"])
  scaling = f"{kind}:" + ",".join(f"{key}={repr(float(value)).removesuffix('.0')}" for key, value in numbers.items())
  try:
    parse_scaling(scaling)
  except UserError as error:
    refuse(str(error).removesuffix("."))
  return {"rope_theta": float(theta), "rope_scaling": scaling}


def write_rope(config: ModelConfig) -> dict[str, Any]:
  """The fields of config.json, in the old layout, which transformers 4 and 5 read."""
  if not config.rope_scaling:
    return {"rope_theta": config.rope_theta}
  name, numbers = parse_scaling(config.rope_scaling)
  kinds = {ORIGINAL: int, "truncate": bool}
  scaling = {key: kinds.get(key, float)(value) for key, value in numbers.items()}
  return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": name, **scaling}}
