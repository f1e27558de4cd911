"""The product of rows and a weight, whose gradient is written down, against the einsum that JAX differentiates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsparse.models.layers import project

SIZES = {"b": 2, "t": 5, "d": 6, "f": 7, "n": 3, "h": 4, "v": 8}


def plain(pattern, x, weight):
  """The einsum, with two letters that go together as one: their sum is taken in their order."""
  if "nhd" in pattern:
    x, weight = x.reshape(*x.shape[:2], -1), weight.reshape(-1, weight.shape[-1])
  return jnp.einsum(
    pattern.replace("nhd", "fd").replace("btnh,", "btf,"), x, weight, preferred_element_type=jnp.float32
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["btd,df->btf", "btf,fd->btd", "btd,dnh->btnh", "btnh,nhd->btd"])
def test_project_and_its_gradients_are_those_of_einsum(pattern, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [[SIZES[letter] for letter in letters] for letters in pattern.replace("->", ",").split(",")]
  x, weight, dout = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
  ours, gradient = jax.vjp(lambda *args: project(pattern, *args, jnp.float32), x, weight)
  exact, expected = jax.vjp(functools.partial(plain, pattern), x, weight)
  np.testing.assert_array_equal(ours, exact)
  for mine, theirs in zip(gradient(dout.astype(jnp.float32)), expected(dout.astype(jnp.float32)), strict=True):
    assert mine.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (mine, theirs)), rtol=tolerance, atol=tolerance)
