"""FFN activations: pure functions of (gate, up), the one table that every path of the project uses.

The FFN of a gated model is `down(hidden)` with `hidden = act(gate(x), up(x))`. What makes a model activation-sparse is
that `hidden` holds exact zeros: the row of `down` (and with gate-first decoding the row of `up`) need not be read.

    activation            hidden                          exact zeros where
    swiglu                silu(gate) * up                 (none)
    geglu                 gelu(gate) * up                 (none)
    geglu_tanh            gelu_tanh(gate) * up            (none)
    relu                  max(0, gate) * up               gate <= 0
    relu2                 max(0, gate)^2 * up             gate <= 0
    shifted_relu:B        max(0, gate - B) * up           gate <= B
    fatrelu:T             (gate if gate >= T else 0) * up gate < T
    drelu                 max(0, gate) * max(0, up)       gate <= 0 or up <= 0
    topk:S                TopK(silu(gate) * up)           (the round(S F) entries smallest in size)
    qsparse:S             TopK(max(0, gate)^2 * up)       (the same)

To add one: write the function with its formula and paper, add a line to ACTIVATIONS (PARAMETRIC, WHOLE_ROWS).
"""

import dataclasses
import difflib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tsparse.errors import UserError
from tsparse.topk import kept, largest

Array = jax.Array
KEPT_MASK = "topk"  # what policies of jax.checkpoint call the mask of the entries of a row that are kept


def swiglu(gate: Array, up: Array) -> Array:
  """silu(gate) * up. Shazeer 2020 (arXiv 2002.05202): the dense activation of Llama, Mistral and Mixtral."""
  return jax.nn.silu(gate) * up


def geglu(gate: Array, up: Array) -> Array:
  """gelu(gate) * up, with the exact (erf) GELU. Shazeer 2020 (arXiv 2002.05202)."""
  return jax.nn.gelu(gate, approximate=False) * up


def geglu_tanh(gate: Array, up: Array) -> Array:
  """gelu_tanh(gate) * up, gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (arXiv 1606.08415): Gemma."""
  return jax.nn.gelu(gate, approximate=True) * up


def relu(gate: Array, up: Array) -> Array:
  """max(0, gate) * up, known as ReGLU (arXiv 2002.05202); ReLULlama and ProSparse (arXiv 2402.13516) use it."""
  return jax.nn.relu(gate) * up


def relu2(gate: Array, up: Array) -> Array:
  """max(0, gate)^2 * up. ReLU^2 Wins (arXiv 2402.03804)."""
  return jnp.square(jax.nn.relu(gate)) * up


def drelu(gate: Array, up: Array) -> Array:
  """max(0, gate) * max(0, up). Turbo Sparse (arXiv 2406.05955), section 3.2."""
  return jax.nn.relu(gate) * jax.nn.relu(up)


def shifted_relu(gate: Array, up: Array, shift: float) -> Array:
  """max(0, gate - shift) * up. ReLU Strikes Back (arXiv 2310.04564), section 5.3."""
  return jax.nn.relu(gate - shift) * up


def fatrelu(gate: Array, up: Array, threshold: float) -> Array:
  """(gate if gate >= threshold else 0) * up, threshold >= 0. ProSparse (arXiv 2402.13516), third step; it used 0.01."""
  return jnp.where(gate >= threshold, gate, 0) * up


def topk(gate: Array, up: Array, sparsity: float) -> Array:
  """The entries of silu(gate) * up largest in size, F - round(sparsity F) of each token; the others are 0.

  SwiGLU under the masks of Turbo Sparse's analysis (arXiv 2406.05955, section 3), trained under them. What is 0 has
  no gradient, as in top-k autoencoders (arXiv 2406.04093). F must be whole.
  """
  hidden = swiglu(gate, up)
  return jnp.where(_largest(hidden, sparsity), hidden, 0)


def qsparse(gate: Array, up: Array, sparsity: float) -> Array:
  """The entries of max(0, gate)^2 * up largest in size, F - round(sparsity F) of each token; the others are 0.

  Q-Sparse (arXiv 2407.10969) in the FFN hidden: the gradient passes the mask as if there were none (straight-through).
  Its division by the length of the row is left out: a model trained without it cannot bear it. F must be whole.
  """
  hidden = relu2(gate, up)
  dropped = jnp.where(_largest(hidden, sparsity), 0, hidden)
  return hidden - jax.lax.stop_gradient(dropped)  # x - x is 0, exactly


def _largest(hidden: Array, sparsity: float) -> Array:
  """Mask of the entries of a row that are kept. Making it is slow (topk.py), so the backward pass has it too."""
  size = jnp.abs(jax.lax.stop_gradient(hidden)).astype(jnp.float32)
  return checkpoint_name(largest(size, kept(jnp.float32(sparsity), hidden.shape[-1])), KEPT_MASK)


@dataclasses.dataclass(frozen=True)
class Activation:
  """An activation by name.

  Attributes:
    name: as the user wrote it, parameter included (`"fatrelu:0.01"`).
    function: (gate [..., F], up [..., F]) -> hidden [..., F], same dtype.
    zero_where: the condition on an entry under which `hidden` is exactly 0; empty when there is none.
    whole_rows: entries depend on the others of their row, which therefore must not be split or skipped.
  """

  name: str
  function: Callable[[Array, Array], Array]
  zero_where: str = ""
  whole_rows: bool = False

  def __call__(self, gate: Array, up: Array) -> Array:
    """Hidden [..., F] of gate and up [..., F]."""
    return self.function(gate, up)

  @property
  def exact_zeros(self) -> bool:
    """Whether `hidden` holds exact zeros that a sparse decoder can skip."""
    return bool(self.zero_where)


ACTIVATIONS = {
  "swiglu": (swiglu, ""),
  "geglu": (geglu, ""),
  "geglu_tanh": (geglu_tanh, ""),
  "relu": (relu, "gate <= 0"),
  "relu2": (relu2, "gate <= 0"),
  "drelu": (drelu, "gate <= 0 or up <= 0"),
}
PARAMETRIC = {
  "shifted_relu": (shifted_relu, "gate <= {}"),
  "fatrelu": (fatrelu, "gate < {}"),
}
# With a number too. Entries of a row are compared: none of them has a condition of its own.
WHOLE_ROWS = {"topk": topk, "qsparse": qsparse}


def activation(name: str) -> Activation:
  """The activation called `name`: a key of ACTIVATIONS, or `key:number` for one of PARAMETRIC.

  Raises:
    UserError: the name is unknown, or its parameter is missing, superfluous or not a non-negative number.
  """
  key, colon, text = name.partition(":")
  if key in ACTIVATIONS and not colon:
    function, zero_where = ACTIVATIONS[key]
    return Activation(name, function, zero_where)
  if key in PARAMETRIC or key in WHOLE_ROWS:
    if not re.fullmatch(r"\d+\.?\d*(e-?\d+)?", text):
      raise UserError(f"activation {name!r} needs a non-negative number after the colon, as in '{key}:0.01'.")
    value = float(text)
    whole = key in WHOLE_ROWS
    if whole and value >= 1:
      raise UserError(f"activation {name!r}: the number is the share of zeros, below 1.")
    function, zero_where = (WHOLE_ROWS[key], "") if whole else PARAMETRIC[key]
    return Activation(name, lambda gate, up: function(gate, up, value), zero_where.format(value), whole)
  known = [*ACTIVATIONS, *(f"{key}:NUMBER" for key in (*PARAMETRIC, *WHOLE_ROWS))]
  nearest = difflib.get_close_matches(key, [*ACTIVATIONS, *PARAMETRIC, *WHOLE_ROWS], n=1)
  hint = f" Did you mean {nearest[0]!r}?" if nearest and nearest[0] != key else ""
  raise UserError(f"activation {name!r} is unknown: choose one of {', '.join(known)}.{hint}")
