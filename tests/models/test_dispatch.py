"""The ragged all-to-all: that its stand-in of these tests is what is documented, and that a TPU's compiler takes it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import ragged
from tests.train.test_step import small
from tsparse import sharding
from tsparse.check import check_step
from tsparse.errors import UserError
from tsparse.plan import compile_step
from tsparse.train import topology

ragged.install()


def exchange(operand, output, *where):
  """`jax.lax.ragged_all_to_all` between as many devices as the arrays, of all devices one after another, allow."""
  mesh = jax.sharding.Mesh(jax.devices()[: len(operand)], "i", axis_types=(jax.sharding.AxisType.Auto,))

  def local(*arrays):
    return jax.lax.ragged_all_to_all(*(x[0] for x in arrays), axis_name="i")[None]

  each = jax.shard_map(local, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False)
  return jax.jit(each)(operand, output, *map(jnp.asarray, where))


def documented(operand, output, input_offsets, send_sizes, output_offsets):
  """The pseudocode of the documentation, in numpy: leading axis of every array is the device."""
  result, devices = output.copy(), len(operand)
  slices = send_sizes.shape[1] // devices
  for source in range(devices):
    for i in range(send_sizes.shape[1]):
      start, size, land = (x[source, i] for x in (input_offsets, send_sizes, output_offsets))
      result[i // slices, land : land + size] = operand[source, start : start + size]
  return result


def received(sizes):
  """recv_sizes for send_sizes [devices, K]."""
  return sizes.reshape(len(sizes), len(sizes), -1).swapaxes(0, 1).reshape(sizes.shape)


def test_the_example_of_the_documentation():
  operand, output = np.array([[1.0, 2, 2], [3, 4, 0]])[..., None], np.zeros((2, 4, 1))
  input_offsets, send_sizes = np.array([[0, 1], [0, 1]]), np.array([[1, 2], [1, 1]])
  output_offsets, recv_sizes = np.array([[0, 0], [1, 2]]), np.array([[1, 1], [2, 1]])
  result = exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
  assert result[..., 0].tolist() == [[1, 3, 0, 0], [2, 2, 4, 0]]
  np.testing.assert_array_equal(received(send_sizes), recv_sizes)
  wrong = exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes + 1)
  assert np.isnan(wrong).all()
  beyond = exchange(operand, output, input_offsets, send_sizes, output_offsets + 2, recv_sizes)
  assert np.isnan(beyond[1]).all()


def test_any_exchange_and_its_gradient_are_those_of_the_documentation():
  """4 devices, 2 slices for each, some of them empty, gaps between them; the gradient is JAX's own rule."""
  random = np.random.default_rng(0)
  sizes = random.integers(0, 4, (4, 8))
  input_offsets = np.cumsum(sizes + 1, 1) - sizes
  lands = received(sizes)  # at each receiver, then as each sender wants to know it
  output_offsets = received(np.cumsum(lands + 1, 1) - lands)
  operand, output = random.normal(size=(4, 40, 3)).astype(np.float32), random.normal(size=(4, 45, 3)).astype(np.float32)
  where = input_offsets, sizes, output_offsets, lands
  np.testing.assert_array_equal(exchange(operand, output, *where), documented(operand, output, *where[:3]))
  weights = random.normal(size=output.shape).astype(np.float32)
  gradient = jax.grad(lambda x: jnp.sum(weights * exchange(x, output, *where)))(operand)
  back = documented(weights, 0 * operand, received(output_offsets), lands, received(input_offsets))
  np.testing.assert_array_equal(gradient, back)


def test_it_is_refused_where_xla_lacks_it():
  """By the platform that is compiled for; virtual CPU devices may stand in for a TPU's when memory is estimated."""
  config, mesh = small(), sharding.make_mesh({"data": 4, "fsdp": 1, "tensor": 1, "expert": 2})
  config.model.update({"num_experts": 4, "experts_per_token": 2, "moe_impl": "ep_ragged_a2a"})
  assert check_step(config, mesh, platform="tpu")
  for platform in ("cpu", "gpu"):
    with pytest.raises(UserError, match=f"a {platform}, for which XLA has no .* set --config.model.moe_impl=ep_allg"):
      check_step(config, mesh, platform)
  config.model.update({"num_experts": 0, "experts_per_token": 0})
  assert check_step(config, mesh, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: requirements-tpu.txt")
def test_a_training_step_with_it_is_compiled_for_tpus():
  """Each of 2 layers sends slots and outputs, in the forward pass, when that is computed again, and backwards."""
  config = small(batch_size=4)
  config.model.update({"num_experts": 4, "experts_per_token": 2, "moe_impl": "ep_ragged_a2a", "d_model": 128})
  devices, compilable = topology.devices("v5e:2x2")
  assert compilable
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1, "expert": 2}, devices)
  assert compile_step(config, mesh)["collectives"]["ragged-all-to-all"]["count"] == 12
