"""A stand-in for the ragged all-to-all, which XLA lacks on CPU (jax-ml/jax, issue 34755): made of all-gathers.

It takes the place of the lowering alone, so that JAX's own rules for shapes and gradients are those under test.
"""

import functools

import jax
import jax.numpy as jnp
from jax.interpreters import mlir


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups=None
):
  """What the documentation of `jax.lax.ragged_all_to_all` says, and NaN everywhere where its caller may not call it:

  sizes received that are not those sent, or slices beyond the arrays.
  """
  assert axis_index_groups is None
  group, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  per_device = send_sizes.size // group

  def of_all(x):  # [sources, slices to me]
    return jax.lax.all_gather(x, axis_name).reshape(group, group, per_device)[:, here]

  operands = jax.lax.all_gather(operand, axis_name)  # [sources, N, ...]
  leave, sizes, land = map(of_all, (input_offsets, send_sizes, output_offsets))
  result, rows = output, jnp.arange(output.shape[0])
  for source in range(group):
    for i in range(per_device):
      at = rows - land[source, i]
      inside = ((at >= 0) & (at < sizes[source, i])).reshape(-1, *(1,) * (output.ndim - 1))
      taken = jnp.take(operands[source], at + leave[source, i], axis=0, mode="clip")
      result = jnp.where(inside, taken, result)
  legal = (recv_sizes == sizes.reshape(-1)).all() & ((land + sizes) <= output.shape[0]).all()
  legal &= ((leave + sizes) <= operand.shape[0]).all() & (leave >= 0).all() & (land >= 0).all() & (sizes >= 0).all()
  return jnp.where(legal, result, jnp.nan)


@functools.cache
def install():
  """Lets this process compile `jax.lax.ragged_all_to_all` for CPU."""
  rows, where = jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32)

  def call(x):
    return jax.lax.ragged_all_to_all(x, x, where, where, where, where, axis_name="i")

  primitive = jax.make_jaxpr(call, axis_env=[("i", 2)])(rows).eqns[-1].primitive
  assert primitive.name == "ragged_all_to_all"
  mlir.register_lowering(primitive, mlir.lower_fun(ragged_all_to_all, multiple_results=False), platform="cpu")
