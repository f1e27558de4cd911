"""Kernels and generation on a mesh give what one device gives."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.sparse.test_generate import PROMPTS, rows
from tests.sparse.test_kernels import close, layer, normal
from tsparse import sharding
from tsparse.activations import activation
from tsparse.models.config import PRESETS
from tsparse.models.transformer import Transformer, init_parameters
from tsparse.sparse.generate import Decoder
from tsparse.sparse.kernels import native, table
from tsparse.sparse.kernels.table import KERNELS
from tsparse.sparse.layout import arrange, leaves_of

NAMES = ("native", "reference") if native.available() else ("reference",)


def on_mesh():
  return jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4, "expert": 1}))


@pytest.mark.parametrize("name", NAMES)
def test_each_device_has_its_share_of_the_neurons_outputs_and_heads(name):
  *args, neurons, predictor = layer(3, 40, 96, jnp.bfloat16, experts=4, chosen=2, rank=6)
  predictor = predictor._replace(threshold=jnp.array([0.0, 9.0, -9.0, 4.0]))
  query, key, value = normal(0, 3, 1, 8, 10), normal(1, 3, 4, 16, 10), normal(2, 3, 4, 16, 10)
  attended = query, key, value, jnp.array([[0], [7], [15]], jnp.int32), 5, 0.4
  w, drelu, single = normal(9, 64, 40, dtype=jnp.bfloat16), activation("drelu"), KERNELS["reference"]

  def all_three(x, *others):
    out, fired = table.feed_forward(KERNELS[name], "predictor", drelu, x, *others)
    return out, fired, table.linear(KERNELS[name], x, w), table.attend(KERNELS[name], *attended)

  with on_mesh():
    got = jax.jit(all_three)(*args, neurons, predictor)
    assert got[2].sharding.spec == jax.P(None, "tensor")
  want, fired = single.feed_forward("predictor", drelu, *args, neurons, predictor)
  for one, other in zip(got, (want, fired, single.linear(args[0], w), single.attend(*attended)), strict=True):
    close(one, other)


def test_generation_on_a_mesh_gives_the_tokens_of_one_device():
  config = dataclasses.replace(
    PRESETS["tiny_moe"], num_layers=1, d_model=32, d_ff=64, num_kv_heads=4, head_dim=8, activation="drelu"
  )
  leaves = leaves_of(init_parameters(Transformer(config), jax.random.key(0)))
  alone = rows(Decoder(config, arrange(config, leaves), "off", NAMES[0]), PROMPTS, 8)
  with on_mesh():
    decoder = Decoder(config, arrange(config, leaves), "exact", NAMES[0])
    gate, head = decoder.params["layers"][0]["neurons"].gate, decoder.params["head"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(4, 16, 32)}
    assert {shard.data.shape for shard in head.addressable_shards} == {(config.vocab_size // 4, 32)}
    assert rows(decoder, PROMPTS, 8) == alone
