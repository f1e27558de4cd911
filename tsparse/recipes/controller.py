"""A controller of the penalty's weight: it moves log(lambda) until the measured share of zeros is the one asked for.

    error  e_t = setpoint_t - z_t                z_t  zeros of the batch, smoothed over about 1 / (1 - SMOOTHING) steps
    log lambda_{t+1} = log lambda_t + INTEGRAL / horizon * e_t + PROPORTIONAL * (e_t - e_{t-1})

a PI controller in its velocity form (Astrom and Hagglund, PID Controllers, 1995, section 3.5). The setpoint rises in a
straight line from the zeros there are when the controller starts to the target at step `by`, and stays there; `horizon`
is the number of steps in between (at least SHORTEST), so that a short run is steered as a long one is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

SMOOTHING = 0.9
INTEGRAL, PROPORTIONAL = 300.0, 40.0  # change of log lambda for an error of 1 held over the horizon; of a change of 1
LIMITS = (-14.0, 0.0)  # of log lambda
SHORTEST = 100  # steps of horizon at least


@struct.dataclass
class State:
  """What the controller remembers, part of the TrainState, [G] float32 each; G is 1, or L: each layer by itself.

  Attributes:
    log_weight: log lambda.
    zeros: smoothed share of zeros; negative before the first step.
    start: that of its first step.
    error: of the step before.
  """

  log_weight: Array
  zeros: Array
  start: Array
  error: Array


@dataclasses.dataclass(frozen=True)
class Controller:
  """Settings, static.

  Attributes:
    target: share of zeros.
    begin: the step that it starts at (where the activation has been swapped).
    by: the step at which the setpoint is the target.
    weight: lambda at the start.
    groups: G.
  """

  target: float
  begin: int
  by: int
  weight: float
  groups: int

  def init(self) -> State:
    """The state before the first step."""
    full = lambda value: jnp.full((self.groups,), value, jnp.float32)  # noqa: E731
    return State(log_weight=jnp.log(full(self.weight)), zeros=full(-1.0), start=full(0.0), error=full(0.0))

  def setpoint(self, start: Array, step: Array) -> Array:
    """The zeros that are wanted at `step`, [G]: never fewer than there were at the start, unless the target is."""
    share = jnp.clip((step - self.begin) / max(self.by - self.begin, 1), 0.0, 1.0)
    return start + share * (self.target - start)

  def update(self, state: State, zeros: Array, step: Array) -> State:
    """The state after a step in which the share of zeros was measured, [G] each. Before `begin` nothing changes."""
    first = state.zeros < 0
    smooth = jnp.where(first, zeros, SMOOTHING * state.zeros + (1 - SMOOTHING) * zeros)
    start = jnp.where(first, smooth, state.start)
    error = self.setpoint(start, step) - smooth
    change = INTEGRAL / max(self.by - self.begin, SHORTEST) * error + PROPORTIONAL * jnp.where(
      first, 0, error - state.error
    )
    new = State(jnp.clip(state.log_weight + change, *LIMITS), smooth, start, error)
    return jax.tree.map(lambda old, new: jnp.where(step >= self.begin, new, old), state, new)
