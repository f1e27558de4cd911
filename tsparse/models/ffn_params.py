"""Where the parameters of each kind of FFN (a key of `config.ffn_layers`) lie in a model's tree."""

from collections.abc import Mapping
from typing import Any

PATHS = {"ffn": ("layers", "ffn"), "shared": ("layers", "ffn", "shared"), "first": ("first", "ffn")}


def ffn_of(params: Any, kind: str) -> Any:
  """The parameters (or what else has their tree) of the FFNs of a kind, stacked over layers."""
  for name in PATHS[kind]:
    params = params[name]
  return params


def with_ffn(params: Any, kind: str, leaves: Mapping[str, Any]) -> Any:
  """`params` with `leaves` in the FFNs of a kind, in the place of those of the same names."""
  return _put(params, PATHS[kind], leaves)


def _put(tree: Any, path: tuple[str, ...], leaves: Mapping[str, Any]) -> Any:
  return tree | (leaves if not path else {path[0]: _put(tree[path[0]], path[1:], leaves)})
