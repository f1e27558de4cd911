"""Attention of models/attention.py by attention.cc, where `library.usable`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.native import build

Array = jax.Array


def forward(
  scale: float, window: int, query: Array, key: Array, value: Array, segment_ids: Array, level: int = build.BEST
) -> Array:
  """`attention` without softcap, [B, T, N, H]; arguments are the Rule's and its own."""
  out = jax.ShapeDtypeStruct(query.shape, jnp.float32)
  return _call("tsparse_attention", out, scale, window, level)(query, key, value, segment_ids)


def backward(
  scale: float,
  window: int,
  query: Array,
  key: Array,
  value: Array,
  segment_ids: Array,
  dout: Array,
  level: int = build.BEST,
) -> list[Array]:
  """dquery, dkey and dvalue of dout."""
  outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (query, key, value)]
  return _call("tsparse_attention_backward", outs, scale, window, level)(query, key, value, segment_ids, dout)


def _call(name: str, outs, scale: float, window: int, level: int):
  attributes = {"level": np.int64(level), "scale": np.float32(scale), "window": np.int64(window)}
  return functools.partial(jax.ffi.ffi_call(name, outs, vmap_method="sequential"), **attributes)
