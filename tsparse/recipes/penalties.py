"""What makes entries of the FFN hidden small, and how much it weighs: loss += sum over layers of lambda * penalty.

The penalty of a layer is the mean over all real tokens of the whole batch, scored or not, of the sum over the entries
of a token's hidden (with experts: of the hidden of each expert that it reached, each counted once). It does not depend
on the loss mask nor on the number of microbatches.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from tsparse.errors import UserError

Array = jax.Array


def l1(hidden: Array, scale: float) -> Array:
  """|hidden|, each entry: the regulariser of ProSparse (arXiv 2402.13516, eq. 3). `scale` is not used."""
  del scale
  return jnp.abs(hidden)


def log_sum(hidden: Array, scale: float) -> Array:
  """s log(1 + |hidden| / s), each entry (Candes, Wakin and Boyd 2008, arXiv 0711.1612, the log-sum penalty).

  Its slope is 1 at 0, as that of L1, and 1 / (1 + |hidden| / s) further on: small entries are pushed to zero, and large
  ones, which L1 shrinks too, are left nearly as they are.
  """
  return scale * jnp.log1p(jnp.abs(hidden) / scale)


PENALTIES: dict[str, Callable[[Array, float], Array]] = {"l1": l1, "log": log_sum}


def staged(step: Array, stages: Sequence[tuple[float, float]]) -> Array:
  """lambda, [] float32, of ProSparse's staged sine schedule (arXiv 2402.13516, section 3.2).

  Constant lambda_0 until T_0, and in stage i, from T_{i-1} to T_i,

      lambda = lambda_{i-1} + eta (lambda_i - lambda_{i-1})
      eta = (sin(-pi / 2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2

  and constant after the last.

  Args:
    step: t, traced.
    stages: (T_i, lambda_i) in steps, T rising.
  """
  weight = jnp.float32(stages[0][1])
  for (start, low), (end, high) in zip(stages, stages[1:], strict=False):
    eta = (jnp.sin(jnp.pi * (jnp.clip((step - start) / (end - start), 0, 1) - 0.5)) + 1) / 2
    weight += eta * (high - low)
  return weight


def parse_stages(text: str, steps: int) -> tuple[tuple[float, float], ...]:
  """ "0.1:0, 0.6:0.003" -> ((0.1 * steps, 0.0), (0.6 * steps, 0.003)): shares of training and the lambda reached there.

  Raises:
    UserError: it is not of that form, shares do not rise, or one lies after the end of training.
  """
  place = f"config.sparsity.stages is {text!r}"
  try:
    stages = [tuple(map(float, stage.split(":"))) for stage in text.split(",")]
    shares, weights = zip(*stages, strict=True)
  except ValueError:
    raise UserError(
      f"{place}: write SHARE:LAMBDA pairs, as in '0.1:0,0.6:0.003', shares of the training steps."
    ) from None
  if not all(0 <= weight < float("inf") for weight in weights):
    raise UserError(f"{place}: a lambda must not be negative, and finite.")
  if any(not a < b for a, b in zip(shares, shares[1:], strict=False)) or not shares[0] >= 0:
    raise UserError(f"{place}: the shares of training must rise, from 0 on.")
  if shares[-1] > 1:
    raise UserError(f"{place} and ends after training: the last share must be at most 1.")
  return tuple((share * steps, weight) for share, weight in stages)
