"""Parameters as decoding reads them: a layer at a time, every matrix in rows that one output is the product of.

    embed [V, D] · final_norm [D] · head [V, D] (absent when tied) · layers, one dict for each:
    attention_norm, ffn_norm [D] · attention_post_norm, ffn_post_norm [D]                              with post_norms
    qkv [(N + 2K) H, D] · out [D, N H] · qkv_bias [(N + 2K) H] · query_norm [N H], key_norm [K H]
    neurons: gate, up, down [E, F, D], so that a neuron is three rows; E is 1 where there are no experts
    router [D, E] · shared: neurons as of one expert · shared_gate [D]                                 with experts
    fc1 [E, R, D], fc2 [E, F, R], threshold [E]                                   with predictors (and thresholds)
    hidden_threshold [1] · shared_hidden_threshold [1]                            with hidden_thresholds

Matrices keep the dtype they are stored in or get the one asked for; norms, biases and routers are float32. A layer is
read, turned and placed before the next is read, so that a stored model is never in memory twice. On a mesh
(`jax.set_mesh`) the rows of embed, head, qkv and out, and the neurons F, are split over its `tensor` axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsparse.convert.leaf import Leaf, contiguous
from tsparse.models.config import ModelConfig
from tsparse.sharding import path_name
from tsparse.sparse.kernels import reference
from tsparse.sparse.kernels.reference import Neurons
from tsparse.sparse.kernels.table import tensor_axis

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def leaves_of(params: Any) -> dict[str, Leaf]:
  """A tree of parameters (models/transformer.py) as leaves, for `arrange`."""

  def leaf(array: Any) -> Leaf:
    return Leaf(array.shape, np.dtype(array.dtype), 0, lambda _: np.asarray(array))

  return {path_name(path): leaf(array) for path, array in jax.tree_util.tree_leaves_with_path(params)}


def arrange(
  config: ModelConfig,
  leaves: Mapping[str, Leaf],
  dtype: str = "",
  place: Callable[[Neurons], Neurons] = reference.place,
) -> dict[str, Any]:
  """The parameters of a model in the layout of this module, on the default device or the mesh that is set.

  Args:
    config: the model.
    leaves: path -> parameter, as models/transformer.py names them.
    dtype: of the matrices, a key of DTYPES; "" is that of each leaf.
    place: what the kernels make of the shape of neurons.
  """
  mesh = jax.sharding.get_mesh()

  def put(array: np.ndarray, split: int | None = None) -> jax.Array:  # over the tensor axis along that axis
    if mesh.empty:
      return jax.device_put(array)
    spec = P() if split is None else P(*(None,) * split, tensor_axis(array.shape[split]))
    return jax.device_put(array, NamedSharding(mesh, spec))

  def vector(name: str, *index: int) -> jax.Array:
    return put(leaves[name].at(index).astype(np.float32).reshape(-1))

  def matrix(array: np.ndarray, split: int | None = 0) -> jax.Array:
    return put(contiguous(array.astype(DTYPES[dtype], copy=False) if dtype else array), split)

  def turned(array: np.ndarray) -> np.ndarray:  # [..., in, out] -> [..., out, in]
    return np.swapaxes(array, -1, -2)

  def neurons(prefix: str, layer: int) -> Neurons:
    gate, up, down = (leaves[f"{prefix}/{name}"].at((layer,)) for name in Neurons._fields)
    parts = (part if part.ndim == 3 else part[None] for part in (turned(gate), turned(up), down))
    return place(Neurons(*(matrix(part, split=1) for part in parts)))

  def layer_of(stack: str, index: int) -> dict[str, Any]:
    def rows(name: str) -> np.ndarray:  # [D, heads, H] -> [heads H, D]
      return turned(leaves[f"{stack}/attention/{name}"].at((index,)).reshape(config.d_model, -1))

    norms = ("attention_norm", "ffn_norm", *(("attention_post_norm", "ffn_post_norm") if config.post_norms else ()))
    layer = {name: vector(f"{stack}/{name}", index) for name in norms}
    layer["qkv"] = matrix(np.concatenate([rows("query"), rows("key"), rows("value")]))
    layer["out"] = matrix(turned(leaves[f"{stack}/attention/out"].at((index,)).reshape(-1, config.d_model)))
    if config.attention_bias:
      biases = [vector(f"{stack}/attention/{name}_bias", index) for name in ("query", "key", "value")]
      layer["qkv_bias"] = jax.numpy.concatenate(biases)
    if config.qk_norm:
      layer |= {name: vector(f"{stack}/attention/{name}", index) for name in ("query_norm", "key_norm")}
    layer["neurons"] = neurons(f"{stack}/ffn", index)
    if config.hidden_thresholds:
      layer["hidden_threshold"] = vector(f"{stack}/ffn/threshold", index)
    if f"{stack}/ffn/shared/threshold" in leaves:
      layer["shared_hidden_threshold"] = vector(f"{stack}/ffn/shared/threshold", index)
    if f"{stack}/ffn/router" in leaves:
      layer["router"] = put(leaves[f"{stack}/ffn/router"].at((index,)).astype(np.float32))
    if f"{stack}/ffn/shared/gate" in leaves:
      layer["shared"] = neurons(f"{stack}/ffn/shared", index)
    if f"{stack}/ffn/shared_gate" in leaves:
      layer["shared_gate"] = vector(f"{stack}/ffn/shared_gate", index)
    if config.predictor_ranks:
      rank = config.predictor_ranks[index]  # shorter ones are stacked with zeros behind them
      fc1, fc2 = (leaves[f"{stack}/ffn/predictor/{name}"].at((index,)) for name in ("fc1", "fc2"))
      for name, part, split in (("fc1", fc1[..., :rank], None), ("fc2", fc2[..., :rank, :], 1)):
        layer[name] = matrix(turned(part) if part.ndim == 3 else turned(part)[None], split)
      if config.predictor_thresholds:
        layer["threshold"] = vector(f"{stack}/ffn/predictor/threshold", index)
    return layer

  first = config.dense_layers
  params = {
    "embed": matrix(leaves["embed"].at(())),
    "final_norm": vector("final_norm"),
    "layers": [layer_of("first", i) for i in range(first)]
    + [layer_of("layers", i) for i in range(config.num_layers - first)],
  }
  if not config.tie_embeddings:
    params["head"] = matrix(turned(leaves["head"].at(())))
  return params
