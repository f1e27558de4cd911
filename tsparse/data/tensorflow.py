"""The one place that imports TensorFlow: late, silently and without touching an accelerator."""

import contextlib
import functools
import os
import sys
from types import ModuleType


@functools.cache
def load_tensorflow() -> tuple[ModuleType, ModuleType]:
  """Returns `(seqio, tensorflow)`, importing them on the first call (about 6 seconds and 1 GB)."""
  # TensorFlow writes notices before it reads its own log level, so only moving descriptor 2 can silence them.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
  with silent_stderr():
    import seqio
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the GPU's memory is JAX's
  return seqio, tf


@contextlib.contextmanager
def silent_stderr():
  """Drops what is written to descriptor 2 meanwhile, by C++ code too; exceptions still pass."""
  sys.stderr.flush()
  saved = os.dup(2)
  with open(os.devnull, "wb") as devnull:
    os.dup2(devnull.fileno(), 2)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    os.close(saved)
