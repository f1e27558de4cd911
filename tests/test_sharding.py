import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tsparse import sharding
from tsparse.errors import UserError
from tsparse.models.config import PRESETS
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.native import library


def mesh_sizes(**sizes):
  return {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | sizes


def test_minus_one_takes_the_devices_the_others_leave():
  assert sharding.make_mesh(mesh_sizes(fsdp=-1, tensor=2)).shape == {"data": 1, "fsdp": 4, "tensor": 2, "expert": 1}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 3, "fsdp": -1}, {"data": -1, "fsdp": -1}, {"tensor": 0}])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(sizes):
  with pytest.raises(UserError, match=r"config\.mesh"):
    sharding.make_mesh(mesh_sizes(**sizes))


@dataclasses.dataclass(frozen=True)
class Chip:
  """What mesh_utils asks of a TPU device; a slice of v5e:2x2 has one chip of each coordinate."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  process_index: int = 0


def test_slices_split_the_data_axis_and_nothing_else():
  chips = [Chip(4 * i + 2 * y + x, i, (x, y, 0)) for i in range(2) for y in range(2) for x in range(2)]
  for shape in ((2, 4, 1, 1), (4, 2, 1, 1), (2, 1, 2, 2)):
    grid = sharding.arrange(shape, chips)
    assert grid.shape == shape and {chip.id for chip in grid.flat} == set(range(8))
    for i, half in enumerate((grid[: shape[0] // 2], grid[shape[0] // 2 :])):
      assert {chip.slice_index for chip in half.flat} == {i}
  with pytest.raises(UserError, match="on 2 slices: .* set --config.mesh.data=2, or a multiple"):
    sharding.make_mesh(mesh_sizes(fsdp=-1), chips)


def test_a_mesh_axis_shards_one_dimension_of_an_array():
  assert sharding.spec("BTD") == P(("data", "fsdp", "expert"), None, None)
  assert sharding.spec("LEDF") == P(None, "expert", "fsdp", "tensor")
  assert sharding.spec("VD") == P("tensor", ("fsdp", "expert"))


def test_constraints_are_in_the_program_and_only_under_a_mesh():
  def program():
    return str(jax.make_jaxpr(lambda x: sharding.constrain(x, "BTD"))(np.zeros((8, 4, 4))))

  assert "sharding_constraint" not in program()
  with jax.set_mesh(sharding.make_mesh(mesh_sizes(fsdp=8))):
    assert "sharding_constraint" in program()


@pytest.mark.parametrize(("experts", "impl", "expected"), [(0, "dense", 7), (4, "dense", 8), (4, "ragged", 6)])
def test_every_constraint_of_the_model_is_in_its_program(experts, impl, expected):
  """Embedding, layer input, query, key, hidden (with experts also the router's weights), layer output, logits.

  Ragged experts have none of their own: their arrays are split by the specs of a shard_map, as attention's are on a TPU
  and, natively, on a CPU.
  """
  config = dataclasses.replace(PRESETS["tiny"], num_experts=experts, experts_per_token=min(2, experts), moe_impl=impl)
  model = Transformer(config)
  shapes, _ = abstract_parameters(model)
  row = jax.ShapeDtypeStruct((8, 4), "int32")
  with jax.set_mesh(sharding.make_mesh(mesh_sizes(fsdp=8))):
    program = jax.make_jaxpr(model.apply)({"params": shapes}, row, row, row)
  assert str(program).count("sharding_constraint[") == expected
  assert str(program).count("shard_map[") == 1 + library.available() + (impl == "ragged")


def test_an_axis_that_does_not_divide_is_named():
  mesh = sharding.make_mesh(mesh_sizes(data=2, tensor=4))
  sharding.check_divisible(mesh, {"B": 6, "F": 8})
  with pytest.raises(UserError, match="axis F has length 6, .* tensor=4"):
    sharding.check_divisible(mesh, {"F": 6})


TREE = {"layers": {"ffn": {"gate": 1, "up": 2}, "ffn_norm": 3}, "embed": 4}


def test_the_first_matching_rule_wins():
  actions = sharding.match([(".*norm", "keep"), ("layers/.*", "decay"), (".*", "other")], TREE)
  assert actions == {"layers": {"ffn": {"gate": "decay", "up": "decay"}, "ffn_norm": "keep"}, "embed": "other"}


@pytest.mark.parametrize(
  ("rules", "sentence"),
  [
    ([("layers/.*", 0)], "'embed' matches none"),
    ([("gate", 0), (".*", 1)], r"\['gate'\] match no parameter"),
    ([(".*", 0), ("embed", 1)], r"\['embed'\] match no parameter"),
  ],
)
def test_unmatched_parameters_and_unused_rules_are_errors(rules, sentence):
  with pytest.raises(UserError, match=sentence):
    sharding.match(rules, TREE)
