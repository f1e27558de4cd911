"""The library of native/: its results whatever the threads, and what is said where it cannot be had."""

import subprocess
import sys

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tsparse.native import library

OF_EACH_FUNCTION = """
import jax, jax.numpy as jnp
from tests.models import test_attention, test_grouped
from tsparse.native import attention, grouped, library
assert library.available()
x, w, dout = test_grouped.operands(1301, 3, 700, 530)
sizes = jnp.array([1, 1171, 100], jnp.int32)
outs = *grouped.products(x, (w,), sizes), grouped.transposed((dout,), (w,), sizes), *grouped.outers(x, (dout,), sizes)
*args, dout = test_attention.operands(200, 6, 3, 24)
outs += attention.forward(0.2, 70, *args), *attention.backward(0.2, 70, *args, dout)
print([hash(out.tobytes()) for out in jax.device_get(outs)])
"""


def run(program, **env):
  env = ENVIRONMENT | {"PYTHONHASHSEED": "0", "XLA_FLAGS": ""} | env
  return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True)


@pytest.mark.skipif(not library.available(), reason="no C++ compiler")
def test_results_do_not_depend_on_the_threads():
  """The same bits by one thread and by several, which cut the work otherwise."""
  assert len({run(OF_EACH_FUNCTION, NPROC=threads).stdout for threads in ("1", "2", "5")}) == 1


def test_without_a_compiler_one_line_says_so():
  asked_twice = "from tsparse.native import library\nassert not library.available() and not library.available()"
  said = run(asked_twice, CXX="no-such-compiler").stderr
  assert said.count("\n") == 1 and said.startswith("native code is not used: no C++ compiler"), said
