"""The model that a student learns from: held as the student is, without a second copy of what that never changes."""

import dataclasses
from typing import Any

import jax

from tsparse.models.config import ModelConfig
from tsparse.models.transformer import Transformer
from tsparse.recipes import trained
from tsparse.recipes.thresholds import without
from tsparse.sharding import path_name


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A decoder and which of its parameters are the student's.

  Attributes:
    model: the decoder.
    shared: tree of bool over its parameters, true where they are read from the student's; None where none is.
  """

  model: Transformer
  shared: Any = dataclasses.field(default=None, hash=False, compare=False)

  def own(self, params: Any) -> Any:
    """`params` without what is shared: None in its place."""
    return params if self.shared is None else jax.tree.map(lambda x, s: None if s else x, params, self.shared)

  def whole(self, own: Any, student: Any) -> Any:
    """All parameters of the teacher, of its own and the student's."""
    if self.shared is None:
      return own
    student = student if self.model.config.hidden_thresholds else without(student)
    return jax.tree.map(lambda s, mine, theirs: theirs if s else mine, self.shared, own, student)


def teacher_of(
  config: ModelConfig, like: ModelConfig, rules: str, shapes: Any, is_start: bool, made_ready: bool = False
) -> Teacher:
  """The teacher of architecture `config`, computed as the student `like` is.

  Args:
    config: of the stored model.
    like: of the student.
    rules: config.train.rules.
    shapes: of the student's parameters.
    is_start: the student starts from this very model, so that what the rules freeze stays the same in both,
    made_ready: but for its FFNs, which are changed before the first step (recipes/start.py).
  """
  own = {name: getattr(like, name) for name in ("dtype", "remat", "moe_impl", "attention_impl")}
  model = dataclasses.replace(config, **own)
  shared = trained.frozen(trained.actions(trained.parse(rules), shapes)) if is_start and rules else None
  if shared and made_ready:
    shared = jax.tree_util.tree_map_with_path(lambda path, s: s and "/ffn/" not in path_name(path), shared)
  if shared and not config.hidden_thresholds:
    shared = without(shared)
  return Teacher(Transformer(model), shared if shared and any(jax.tree.leaves(shared)) else None)
