import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tsparse.activations import ACTIVATIONS, activation
from tsparse.errors import UserError

GATE, UP = np.random.default_rng(0).normal(size=(2, 50, 40)).astype(np.float32)

NUMPY = {
  "swiglu": lambda g, u: g * scipy.special.expit(g) * u,
  "geglu": lambda g, u: g * 0.5 * (1 + scipy.special.erf(g / np.sqrt(2))) * u,
  "geglu_tanh": lambda g, u: g * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u,
  "relu": lambda g, u: np.maximum(g, 0) * u,
  "relu2": lambda g, u: np.maximum(g, 0) ** 2 * u,
  "drelu": lambda g, u: np.maximum(g, 0) * np.maximum(u, 0),
  "shifted_relu:0.3": lambda g, u: np.maximum(g - 0.3, 0) * u,
  "fatrelu:0.3": lambda g, u: np.where(g >= 0.3, g, 0) * u,
}


def test_every_activation_is_compared():
  assert set(ACTIVATIONS) < set(NUMPY)


@pytest.mark.parametrize("name", NUMPY)
def test_formula(name):
  np.testing.assert_allclose(activation(name)(GATE, UP), NUMPY[name](GATE, UP), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NUMPY)
def test_zeros_are_where_the_activation_says(name):
  act = activation(name)
  promised = np.zeros(GATE.shape, bool)
  for condition in filter(None, act.zero_where.split(" or ")):
    promised |= eval(condition, {"gate": GATE, "up": UP})
  np.testing.assert_array_equal(np.asarray(act(GATE, UP)) == 0, promised)
  assert act.exact_zeros == promised.any()


def test_drelu_passes_no_gradient_to_a_silent_neuron():
  grads = jax.grad(lambda g, u: jnp.sum(activation("drelu")(g, u)), argnums=(0, 1))(GATE, UP)
  silent = (GATE <= 0) | (UP <= 0)
  assert all((np.asarray(g)[silent] == 0).all() and (np.asarray(g)[~silent] > 0).all() for g in grads)


@pytest.mark.parametrize(
  ("name", "sentence"),
  [
    ("dreul", "Did you mean 'drelu'"),
    ("drelu:1", "choose one of swiglu"),
    ("fatrelu", "needs a non-negative number"),
    ("fatrelu:-1", "needs a non-negative number"),
    ("shifted_relu:nan", "needs a non-negative number"),
  ],
)
def test_a_wrong_name_is_answered_with_the_known_ones(name, sentence):
  with pytest.raises(UserError, match=sentence):
    activation(name)
