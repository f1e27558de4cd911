"""Native kernels against jnp over the same arrays."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tsparse.activations import ACTIVATIONS, PARAMETRIC, activation
from tsparse.native import build
from tsparse.sparse.kernels import native, reference
from tsparse.sparse.kernels.reference import Neurons, Predictor

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
NAMES = ("swiglu", "geglu", "geglu_tanh", "relu", "relu2", "drelu", "shifted_relu:0.3", "fatrelu:0.2")
SPARSE = tuple(name for name in NAMES if activation(name).exact_zeros)
DTYPES = (jnp.float32, jnp.bfloat16)


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def ffn(kernels, mode, name, *args, **options):
  return counted(kernels, mode, name, *args, **options)[0]


def counted(kernels, mode, name, *args, **options):
  return jax.jit(functools.partial(kernels.feed_forward, mode, activation(name), **options))(*args)


def layer(n, dim, width, dtype, experts=1, chosen=1, rank=0):
  """Arguments of `feed_forward`: x, chosen, weights, neurons, predictor. The last row of several is padding."""
  gate, up = (normal(i, experts, width, dim, dtype=dtype) * dim**-0.5 for i in (1, 2))
  down = normal(3, experts, width, dim, dtype=dtype) * width**-0.5
  index = jnp.argsort(normal(4, n, experts), axis=-1)[:, :chosen].astype(jnp.int32)
  if n > 1:
    index = index.at[-1].set(experts)
  predictor = None
  if rank:
    fc1, fc2 = normal(6, experts, rank, dim, dtype=dtype), normal(7, experts, width, rank, dtype=dtype)
    predictor = Predictor(fc1, fc2, normal(8, n, dim), normal(9, experts))
  return normal(0, n, dim), index, jnp.abs(normal(5, n, chosen)), Neurons(gate, up, down), predictor


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", build.LEVELS)
@pytest.mark.parametrize(("n", "dim", "rows"), [(1, 64, 33), (3, 37, 1), (8, 7, 130), (13, 200, 70)])
def test_a_product_equals_that_of_jnp(n, dim, rows, level, dtype):
  x, w = normal(0, n, dim), normal(1, rows, dim, dtype=dtype)
  out = jax.jit(functools.partial(native.linear, level=build.LEVELS[level]))(x, w)
  close(out, reference.linear(x, w))
  alone = jnp.concatenate([native.linear(row[None], w, build.LEVELS[level]) for row in x])
  np.testing.assert_array_equal(out, alone)  # a row does not depend on those beside it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_ffn_equals_that_of_jnp_by_every_activation(name, dtype):
  for n, dim, width in ((1, 33, 45), (7, 96, 300)):
    args = layer(n, dim, width, dtype)
    dense = ffn(native, "off", name, *args)
    close(dense, ffn(reference, "off", name, *args))
    if n > 1:
      assert not dense[-1].any()
    if name in SPARSE:
      np.testing.assert_array_equal(ffn(native, "exact", name, *args), dense)


def test_every_activation_is_known_to_the_kernels():
  assert {name.partition(":")[0] for name in NAMES} == {*ACTIVATIONS, *PARAMETRIC} == {*native.ACTIVATIONS}


@pytest.mark.parametrize("level", build.LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_and_predictors_equal_those_of_jnp_on_every_instruction_set(level, dtype):
  level = build.LEVELS[level]
  args = layer(6, 50, 300, dtype, experts=4, chosen=2, rank=9)
  want, fired = counted(reference, "predictor", "drelu", *args)
  dense, count = counted(native, "off", "drelu", *args, level=level)
  close(dense, want)
  np.testing.assert_array_equal(count, fired)
  assert float(fired[:-1].min()) > 0 and float(fired[-1]) == 0  # padding fires nothing
  for mode in ("exact", "predictor"):
    for got, same in zip(counted(native, mode, "drelu", *args, level=level), (dense, count), strict=True):
      np.testing.assert_array_equal(got, same)
  assert float(jnp.abs(want - ffn(reference, "off", "drelu", *args[:-1])).max()) > 0.1  # the predictor is seen


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_no_neuron_or_every_neuron_may_fire(mode):
  x, index, weights, neurons, _ = layer(2, 48, 160, jnp.bfloat16)
  x, index = jnp.abs(x), jnp.zeros_like(index)
  for sign, fires in ((1, True), (-1, False)):
    fixed = neurons._replace(gate=sign * jnp.abs(neurons.gate), up=jnp.abs(neurons.up))
    out = ffn(native, mode, "drelu", x, index, weights, fixed)
    close(out, ffn(reference, mode, "drelu", x, index, weights, fixed))
    assert bool(out.any()) == fires


def test_a_number_that_is_none_is_not_hidden_by_skipping():
  x, index, weights, neurons, _ = layer(1, 16, 32, jnp.float32)
  neurons = neurons._replace(gate=neurons.gate.at[0, 3, 2].set(jnp.nan))
  for mode in ("off", "exact"):
    assert jnp.isnan(ffn(native, mode, "drelu", x, index, weights, neurons)).all()


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (5, 0.0), (5, 1.5)])
def test_attention_over_a_cache_equals_that_of_jnp(window, cap):
  query, key, value = normal(0, 3, 1, 8, 10), normal(1, 3, 2, 16, 10), normal(2, 3, 2, 16, 10)
  positions = jnp.array([[0], [7], [15]], jnp.int32)
  args = query, key, value, positions, window, 0.4, cap
  close(native.attend(*args), reference.attend(*args))


def test_large_products_are_shared_out_among_threads():
  x, w = normal(0, 2, 1024), normal(1, 3000, 1024, dtype=jnp.bfloat16)
  close(native.linear(x, w), reference.linear(x, w))
  args = layer(2, 512, 4000, jnp.bfloat16)
  np.testing.assert_array_equal(ffn(native, "exact", "drelu", *args), ffn(native, "off", "drelu", *args))
  assert native.read(w).shape == (1,)


def test_without_a_compiler_one_line_says_so():
  probe = "from tsparse.sparse.kernels import native\nassert not native.available() and not native.available()"
  env = ENVIRONMENT | {"CXX": "no-such-compiler"}
  done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
  assert done.stderr.startswith("native kernels are not used: no C++ compiler")


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
  (tmp_path / "c++").write_text("#!/bin/sh\n[ $1 = --version ] || { echo broken >&2; exit 1; }\n")
  (tmp_path / "c++").chmod(0o755)
  monkeypatch.setenv("CXX", str(tmp_path / "c++"))
  with pytest.raises(build.BuildError, match=r"failed \(broken\)"):
    build.library(Path(native.__file__).with_name("kernels.cc"), tmp_path / "cache")
  assert not list((tmp_path / "cache").iterdir())
