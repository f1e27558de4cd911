"""One table of rules maps the tensors of a Hugging Face checkpoint to our parameters, and back.

A rule says which tensors of theirs fill one parameter of ours, and how a tensor is reshaped, in axis letters:

    Rule("layers/attention/query", "model.layers.{layer}.self_attn.q_proj.weight", "(N H) D -> D N H")

`{layer}` and `{expert}` stand for the indices that our parameter is stacked over, in this order. Read from left to
right the pattern is the import, from right to left the export; letters have the sizes of the model.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import einops
import jax.numpy as jnp
import numpy as np

from tsparse.convert.leaf import Index, Leaf, contiguous
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig


class Rule(NamedTuple):
  """`ours` is a path in our tree, `theirs` a template of names, `pattern` an einops pattern of one of their tensors."""

  ours: str
  theirs: str
  pattern: str


def sources(rule: Rule, config: ModelConfig) -> list[tuple[tuple[int, ...], str]]:
  """(index in our stacked parameter, their name) of every tensor of a rule."""
  dense = config.dense_layers
  start, length = (0, dense) if rule.ours.startswith("first/") else (dense, config.num_layers - dense)
  layers = range(length) if "{layer}" in rule.theirs else (None,)
  experts = range(config.num_experts) if "{expert}" in rule.theirs else (None,)
  return [
    (tuple(i for i in (layer, expert) if i is not None), rule.theirs.format(layer=start + (layer or 0), expert=expert))
    for layer in layers
    for expert in experts
  ]


def sizes(rule: Rule, config: ModelConfig, index: tuple[int, ...] = ()) -> dict[str, int]:
  """Letter -> length in the tensors of a rule: those of the FFN it belongs to; the rank of the layer's predictor.

  Beside those of the parameters there are P = 2 and J = H / 2, the halves of a head.
  """
  shared, first = "/shared/" in rule.ours, rule.ours.startswith("first/")
  owner = config.shared if shared else config.first if first else config
  lengths = {"1": 1, "P": 2, "J": config.head_dim // 2} | owner.sizes
  return lengths | ({"R": config.predictor_ranks[index[0]]} if config.predictor_ranks and index else {})


def shape(side: str, lengths: Mapping[str, int]) -> tuple[int, ...]:
  """Shape of one side of a pattern: `"(N H) D"` -> (N * H, D)."""
  groups = re.findall(r"\(([^)]*)\)|(\w)", side)
  return tuple(int(np.prod([lengths[letter] for letter in (group or single).split()])) for group, single in groups)


def check_names(rules: Iterable[Rule], config: ModelConfig, names: Iterable[str], ignored: Iterable[str] = ()):
  """Raises UserError unless `names` are exactly the tensors of the rules; regexes in `ignored` may be there too."""
  expected = {name for rule in rules for _, name in sources(rule, config)}
  names = {name for name in names if not any(re.fullmatch(pattern, name) for pattern in ignored)}
  problems = [
    f"{title} {', '.join(sorted(found)[:8])}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"
    for title, found in (("it lacks", expected - names), ("nothing takes", names - expected))
    if found
  ]
  if problems:
    raise UserError(f"the checkpoint's tensors are not those of its config.json: {'; '.join(problems)}.")


def to_ours(
  rules: Iterable[Rule],
  config: ModelConfig,
  stored: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  read: Callable[[str], np.ndarray],
) -> dict[str, Leaf]:
  """Our parameters, path -> Leaf; a slice of one reads one of their tensors.

  Args:
    rules: of the family.
    config: the model.
    stored: name of theirs -> (shape, dtype); a parameter has the narrowest dtype that holds all its tensors exactly.
    read: name of theirs -> array.

  Raises:
    UserError: a tensor has another shape than the config says.
  """
  return {rule.ours: _leaf(rule, config, stored, read) for rule in rules}


def _leaf(rule: Rule, config: ModelConfig, stored: Mapping, read: Callable[[str], np.ndarray]) -> Leaf:
  theirs, ours = rule.pattern.split(" -> ")
  names = dict(sources(rule, config))
  for index, name in names.items():
    expected = shape(theirs, sizes(rule, config, index))
    if stored[name][0] != expected:
      raise UserError(
        f"tensor {name} has shape {stored[name][0]} and config.json makes it {expected}: the checkpoint is of another "
        "model."
      )
  stack = tuple(max(i) + 1 for i in zip(*names, strict=True))
  inner = tuple(max(n) for n in zip(*(shape(ours, sizes(rule, config, index)) for index in names), strict=True))
  dtype = np.dtype(functools.reduce(jnp.promote_types, (stored[name][1] for name in names.values())))

  def read_slice(index: Index) -> np.ndarray:
    part = einops.rearrange(read(names[index]), rule.pattern, **letters(rule.pattern, sizes(rule, config, index)))
    part = contiguous(part).astype(dtype, copy=False)
    return np.pad(part, [(0, n - m) for n, m in zip(inner, part.shape, strict=True)]) if part.shape != inner else part

  return Leaf(stack + inner, dtype, len(stack), read_slice)


def to_theirs(rules: Iterable[Rule], config: ModelConfig, parameters: Mapping[str, Leaf]) -> dict[str, Leaf]:
  """Their tensors, name -> Leaf that nothing is stacked in: the inverse of `to_ours`."""
  return {
    name: _tensor(rule, config, index, parameters[rule.ours]) for rule in rules for index, name in sources(rule, config)
  }


def _tensor(rule: Rule, config: ModelConfig, index: Index, parameter: Leaf) -> Leaf:
  theirs, ours = rule.pattern.split(" -> ")
  lengths = sizes(rule, config, index)

  def read(_: Index) -> np.ndarray:
    part = np.asarray(parameter.at(index)[tuple(map(slice, shape(ours, lengths)))])
    return contiguous(einops.rearrange(part, f"{ours} -> {theirs}", **letters(rule.pattern, lengths)))

  return Leaf(shape(theirs, lengths), parameter.dtype, 0, read)


def letters(pattern: str, lengths: Mapping[str, int]) -> dict[str, int]:
  """The lengths of the letters that occur in a pattern."""
  return {letter: length for letter, length in lengths.items() if letter in pattern and letter.isalpha()}
