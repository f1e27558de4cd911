"""The kernels for accelerators: their numbers by interpretation against jnp, their programs by the compilers."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.gpu import lowered_for_gpu
from tests.sparse.test_kernels import close, counted, layer
from tsparse.activations import activation
from tsparse.sparse.kernels import gpu, reference, table, tpu
from tsparse.sparse.kernels.reference import MODES, Neurons, Predictor
from tsparse.train import topology

MODULES = {"tpu": tpu, "gpu": gpu}


@pytest.fixture(scope="module")
def experts():
  """Three tokens, the last of them padding, on two each of four experts with predictors, and what jnp makes of them."""
  *args, predictor = layer(3, 256, 160, jnp.bfloat16, experts=4, chosen=2, rank=8)
  args = *args, predictor._replace(threshold=jnp.array([0.0, 40.0, -30.0, 9.0]))
  return args, counted(reference, "off", "drelu", *args)


@pytest.mark.parametrize(("name", "mode"), [("tpu", mode) for mode in MODES] + [("gpu", mode) for mode in MODES[1:]])
def test_listed_rows_give_the_numbers_of_all_rows(name, mode, experts):
  kernels, ((*args, neurons, predictor), (want, fired)) = MODULES[name], experts
  got, count = counted(kernels, mode, "drelu", *args, kernels.place(neurons), predictor, interpret=True)
  close(got, want)
  np.testing.assert_array_equal(count, fired)
  assert not got[-1].any() and float(jnp.abs(want).max()) > 0.1


@pytest.mark.parametrize("name", MODULES)
def test_another_activation_and_no_neuron_at_all(name):
  """F is no multiple of what the kernels take together, and D none of a GPU's tile."""
  kernels, (*args, neurons, _) = MODULES[name], layer(1, 384, 300, jnp.float32)
  run = jax.jit(functools.partial(kernels.feed_forward, "exact", activation("fatrelu:0.2"), interpret=True))
  got, count = run(*args, kernels.place(neurons))
  want, fired = counted(reference, "off", "fatrelu:0.2", *args, neurons)
  close(got, want)
  assert float(count[0]) == float(fired[0]) > 0
  got, count = run(*args, kernels.place(neurons._replace(gate=0 * neurons.gate)))
  assert not got.any() and not count.any()


def test_a_list_longer_than_the_scalar_memory_is_taken_token_by_token(experts, monkeypatch):
  (x, index, weights, neurons, predictor), (want, _) = experts
  *args, predictor = x[:2], index[:2], weights[:2], predictor._replace(x=predictor.x[:2])
  monkeypatch.setattr(tpu, "SCALARS", 0)
  close(counted(tpu, "off", "drelu", *args, tpu.place(neurons), predictor, interpret=True)[0], want[:2])


def abstract(tokens, experts, chosen, width, dim, slab, rank=0, **place):
  """Arguments of feed_forward that have no values; neurons are [E, F, *slab]."""
  shape = functools.partial(jax.ShapeDtypeStruct, **place)
  w, real = shape((experts, width, *slab), jnp.bfloat16), functools.partial(shape, dtype=jnp.float32)
  fc = (shape((experts, rank, dim), jnp.bfloat16), shape((experts, width, rank), jnp.bfloat16), real((tokens, dim)))
  index = shape((tokens, chosen), jnp.int32)
  return real((tokens, dim)), index, real((tokens, chosen)), Neurons(w, w, w), Predictor(*fc) if rank else None


def program(kernels, mode):
  return jax.jit(functools.partial(kernels.feed_forward, mode, activation("drelu")))


@pytest.mark.parametrize(("mode", "rank", "kernels"), [("off", 0, 0), ("exact", 0, 3), ("predictor", 64, 3)])
def test_the_kernels_for_gpus_are_lowered_without_one(mode, rank, kernels):
  """At Mistral's shape; lowering checks shapes and operations, and the compiler of Triton comes after it."""
  args = abstract(2, 1, 1, 14_336, 4096, (4096,), rank)
  text = lowered_for_gpu(program(gpu, mode), *args)
  assert text.count("xla.gpu.triton") == kernels


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: requirements-tpu.txt")
def test_libtpu_compiles_the_kernels_and_moves_no_weights():
  devices, _ = topology.devices("v5e:2x2")
  args = abstract(1, 4, 2, 1024, 2048, (16, 128), sharding=SingleDeviceSharding(devices[0]))
  compiled = program(tpu, "exact").lower(*args).compile()
  assert compiled.as_text().count("tpu_custom_call") == 3
  assert compiled.memory_analysis().temp_size_in_bytes < args[3].gate.size * 2 / 8  # an expert is a quarter


def test_the_table_says_what_runs_where(monkeypatch, capsys):
  found = {}
  for platform, dim in (("tpu", 256), ("tpu", 100), ("gpu", 100), ("metal", 256)):
    monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
    found[platform, dim] = table.best_kernels(dim)
  assert list(found.values()) == ["tpu", "reference", "gpu", "reference"]
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2 and "tpu kernels are not used: D is 100" in lines[0] and lines[1].startswith("metal kernels")
