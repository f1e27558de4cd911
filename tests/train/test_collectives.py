"""Collectives read from HLO text: loops multiplied, asynchronous forms by their result."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsparse import sharding
from tsparse.train.collectives import collectives, result_bytes

NESTED = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %a = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[8,4]{1,0:T(8,128)} all-reduce(%v), replica_groups={{0,1}}, to_apply=%add
}

%inner_condition (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %w = (s32[], f32[8,4]) while(%t), condition=%inner_condition, body=%inner
  %g = (bf16[4,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%q), dimensions={0}
}

%outer_condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%outer_condition, body=%outer, TRIPS
  %x = f32[2,4]{1,0} reduce-scatter(%a), dimensions={0}, to_apply=%add
}
"""


def test_loops_multiply_and_starts_count_their_result():
  counted = collectives(NESTED.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}'))
  assert counted == {
    "all-gather": {"count": 3, "bytes": 3 * 16 * 4 * 2},
    "all-reduce": {"count": 15, "bytes": 15 * 8 * 4 * 4},
    "reduce-scatter": {"count": 1, "bytes": 2 * 4 * 4},
  }


@pytest.mark.parametrize(
  "branches", ["branch_computations={%few, %many}, metadata={}", "true_computation=%many, false_computation=%few"]
)
def test_of_the_branches_of_a_conditional_the_one_that_sends_most_counts(branches):
  hlo = """%few (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), to_apply=%add
}

%many (p: f32[4]) -> f32[4] {
  %q = f32[4]{0} all-reduce(%p), to_apply=%add
  ROOT %r = f32[4]{0} all-reduce(%q), to_apply=%add
}

ENTRY %main (a: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} conditional(%i, %a, %a), BRANCHES
}
"""
  assert collectives(hlo.replace("BRANCHES", branches)) == {"all-reduce": {"count": 2, "bytes": 32}}


def test_a_fusion_that_keeps_a_part_of_an_all_reduce_is_a_reduce_scatter():
  hlo = """%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %r = f32[8]{0} all-reduce(%p), channel_id=1, to_apply=%add
  ROOT %s = f32[2]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={2}
}

ENTRY %main (a: f32[8]) -> f32[2] {
  ROOT %f = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
  assert collectives(hlo) == {"reduce-scatter": {"count": 1, "bytes": 32}}


def test_parts_of_one_asynchronous_collective_are_one():
  """A TPU's fusions name it at its start, at its end and between."""
  part = "%{0} (p: f32[2]) -> f32[4] {{\n  %g = f32[4]{{0}} all-gather(%p), channel_id={1}, dimensions={{0}}\n}}\n\n"
  fusion = "  %{0}.1 = f32[4] fusion(%a), kind=kCustom, calls=%{0}\n"
  names = ("start", "between", "done", "other")
  parts = "".join(part.format(name, 1 + (name == "other")) for name in names)
  hlo = parts + "ENTRY %main (a: f32[2]) -> f32[4] {\n" + "".join(map(fusion.format, names)) + "}\n"
  assert collectives(hlo) == {"all-gather": {"count": 2, "bytes": 2 * 16}}


def test_collectives_of_one_shard_map_share_a_channel_and_are_told_apart_by_their_origin():
  line = '  %{0} = f32[4]{{0}} all-gather(%p), channel_id=1, metadata={{op_name="{1}" stack_frame_id={2}}}, x={{}}\n'
  lines = "".join(line.format(f"g{i}", *origin) for i, origin in enumerate([("fwd", 1), ("fwd", 2), ("bwd", 1)]))
  assert collectives("ENTRY %main (p: f32[2]) -> f32[4] {\n" + lines + "}\n")["all-gather"]["count"] == 3


def test_a_loop_whose_length_is_unknown_is_not_guessed():
  with pytest.raises(ValueError, match="trip count"):
    collectives(NESTED)


def test_bytes_of_types():
  assert (
    result_bytes("(bf16[2,3]{1,0}, pred[4], s8[5], f8e4m3fn[6], u64[1], f32[])", halves=False) == 12 + 4 + 5 + 6 + 12
  )


def test_a_compiled_program_has_the_collectives_of_its_scan():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1, "expert": 1})
  rows = NamedSharding(mesh, P(None, "fsdp"))
  whole = NamedSharding(mesh, P())

  def program(weights, x):
    return jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), whole), None), x, weights)[0]

  weights = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "fsdp")))
  x = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=rows)
  counted = collectives(jax.jit(program).lower(weights, x).compile().as_text())
  assert counted["all-gather"]["count"] >= 6 and set(counted) == {"all-gather"}
