import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from tsparse.train.allocator import keep_freed_memory
{keep}
import jax, jax.numpy as jnp
double = jax.jit(lambda x: jnp.sin(jnp.outer(x, x) @ jnp.outer(x, x)).sum())
x = jnp.ones(2048)
for _ in range(3):  # temporaries of 32 MiB or more, 8,192 pages
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_a_program_that_runs_again_gets_no_new_pages():
  def faults(keep):
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)

  assert faults("keep_freed_memory()") < 1000 < 8000 < faults("")
