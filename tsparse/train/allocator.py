"""On CPU, the memory that a training step frees is kept for the next one."""

import ctypes

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory():
  """Sets up JAX's CPU client and the C library so that steps do not get new pages; after hosts.start, before any array.

  XLA takes the temporaries of a step in one allocation. glibc maps one of that size and unmaps it when it is freed, and
  the kernel fills the new pages with zeros step by step: an eighth of a step's time, and more where it looks for huge
  pages. Here it comes from the heap, which is never cut. That is the heap of the main thread, the only one that can
  hold it, so that this thread must run the steps itself, and cannot prepare the next batch meanwhile: 2 to 3 % of the
  steps of a tiny model.

  The heap is left as it is on accelerators. Nothing at all is changed where the C library has no `mallopt`.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if not mallopt:
    return
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when the CPU client is made
  if jax.default_backend() == "cpu":
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
