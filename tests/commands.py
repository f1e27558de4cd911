"""Commands as a user types them, forked from a process that has imported what they import: half of a small run's time.

That process is Python's own fork server. It has imported JAX but started no backend, so a command still chooses its
platform, its devices and its XLA flags; it shares nothing with the tests or with another command.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ENVIRONMENT, ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
  ["tests.commands", "tsparse.experiment", "tsparse.plan", "matplotlib.pyplot", "tensorboardX"]
)


def run(script, *arguments, timeout=300, **options) -> subprocess.CompletedProcess:
  """Runs `python SCRIPT ARGUMENTS` from the root of the repository; options are those of Command."""
  return Command(script, *arguments, **options).wait(timeout)


class Command:
  """A running command: `.kill()` it, or `.wait()` for what it printed and its exit code."""

  def __init__(self, script, *arguments, env=ENVIRONMENT, before=""):
    """`before` is code that the process runs first."""
    self.argv = [str(script), *map(str, arguments)]
    self.folder = tempfile.TemporaryDirectory()
    self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
    self.process = FORKS.Process(target=_main, args=(self.argv, dict(env), [*map(str, self.outputs)], before))
    self.process.start()

  def running(self) -> bool:
    return self.process.is_alive()

  def kill(self):
    self.process.kill()

  def wait(self, timeout=300) -> subprocess.CompletedProcess:
    self.process.join(timeout)
    if self.process.is_alive():
      self.kill()
      raise subprocess.TimeoutExpired(self.argv, timeout)
    texts = [path.read_text() if path.exists() else "" for path in self.outputs]
    self.folder.cleanup()
    return subprocess.CompletedProcess(self.argv, self.process.exitcode, *texts)


def _main(argv: list[str], env: dict[str, str], outputs: list[str], before: str):
  for number, path in enumerate(outputs, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
  sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
  os.environ.clear()
  os.environ.update(env)
  os.chdir(ROOT)
  import jax

  jax.config.update("jax_compilation_cache_dir", env.get("JAX_COMPILATION_CACHE_DIR"))  # JAX read it when imported
  sys.argv = argv
  sys.path.insert(0, str(Path(argv[0]).parent))
  try:
    exec(before, {})
    runpy.run_path(argv[0], run_name="__main__")
  finally:
    atexit._run_exitfuncs()  # which a forked process leaves out
