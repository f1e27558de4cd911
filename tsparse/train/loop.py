"""The training loop: from a config to the checkpoints of a workdir."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from tsparse import sharding
from tsparse.data import train_iterator
from tsparse.errors import RunFailure
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import model_config
from tsparse.models.transformer import Transformer, abstract_parameters, init_parameters
from tsparse.progress import ProgressLine
from tsparse.train import checkpoint
from tsparse.train.log import MetricWriter
from tsparse.train.optimizer import learning_rate, make_optimizer, optimizer_shardings
from tsparse.train.step import TrainState, make_train_step

# (tree of ShapeDtypeStruct with shardings) -> (parameters, tokens they have seen)
Init = Callable[[Any], tuple[Any, int]]


@dataclasses.dataclass(frozen=True)
class Run:
  """A model, its optimizer and where their arrays live; nothing is allocated yet."""

  model: Transformer
  tx: optax.GradientTransformation
  target: TrainState  # ShapeDtypeStructs with shardings


def prepare(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Run:
  """Builds the model and the abstract state of `config` on `mesh`."""
  model = Transformer(model_config(config))
  shapes, logical = abstract_parameters(model)
  shardings = sharding.shardings(mesh, logical)
  tx = make_optimizer(config.train, shapes)
  replicated = NamedSharding(mesh, P())
  target = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    params=checkpoint.abstract(shapes, shardings),
    opt_state=checkpoint.abstract(
      jax.eval_shape(tx.init, shapes), optimizer_shardings(tx, shapes, shardings, replicated)
    ),
  )
  return Run(model, tx, target)


def compiled_step(run: Run, settings: ml_collections.ConfigDict) -> Callable:
  """The jitted training step (state, batch) -> (state, metrics) of `config.train`; the state is given away."""
  schedule = learning_rate(settings)
  step = make_train_step(run.model, run.tx, schedule, z_loss=settings.z_loss, microbatches=settings.microbatches)
  return jax.jit(step, donate_argnums=0)


def initial_state(run: Run, seed: int, init: Init | None) -> tuple[TrainState, int]:
  """Step 0 and the tokens seen so far: parameters by `init`, or random when None; a fresh optimizer."""
  tokens_seen = 0
  if init is None:
    make = jax.jit(
      lambda key: init_parameters(run.model, key),
      out_shardings=jax.tree.map(lambda x: x.sharding, run.target.params),
    )
    params = make(jax.random.key(seed))
  else:
    params, tokens_seen = init(run.target.params)
  make = jax.jit(run.tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, run.target.opt_state))
  step = jax.device_put(jnp.zeros((), jnp.int32), run.target.step.sharding)
  return TrainState(step=step, params=params, opt_state=make(params)), tokens_seen


def train(
  config: ml_collections.ConfigDict,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  validation: Sequence[dict[str, np.ndarray]],
  console: Console,
  title: str,
  init: Init | None = None,
) -> None:
  """Trains what `config` says, resuming from the newest checkpoint of `workdir` if there is one.

  Args:
    config: the whole experiment; `model`, `activation`, `data`, `train` and `seed` are read.
    workdir: where checkpoints and metrics go.
    mesh: the devices; it must be set by `jax.set_mesh`.
    validation: batches for the loss on held-out text every `eval_every` steps.
    console: where progress is shown.
    title: what progress calls this stage.
    init: gives the parameters to start from; None starts from random ones.

  Raises:
    RunFailure: the loss or the gradient is not finite.
  """
  settings = config.train
  run = prepare(config, mesh)
  train_step = compiled_step(run, settings)

  with checkpoint.manager(workdir, keep=settings.keep_checkpoints) as checkpoints:
    start, position = checkpoints.latest_step() or 0, None
    if start:
      state, position, tokens_seen = checkpoint.restore(checkpoints, start, run.target)
    else:
      state, tokens_seen = initial_state(run, config.seed, init)
    data = train_iterator(
      config.data,
      seq_len=settings.seq_len,
      batch_size=settings.batch_size,
      seed=data_seed(config.seed, tokens_seen - start * settings.batch_size * settings.seq_len),
    )
    if position:
      data.restore(position)
      console.print(f"{title}  resumed at step {start} of {settings.steps}", highlight=False)

    writer = MetricWriter(workdir, start)
    clock = Clock()
    unread: dict[str, Any] = {}

    def report(step: int, metrics: dict[str, Any]):
      """Reads the metrics of a dispatched step, preferably not of the newest one, so that the device stays busy."""
      loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
      if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunFailure(
          f"{title}: loss {loss} and gradient norm {grad_norm} at step {step} are not finite; nothing was saved of "
          f"that step in {workdir}. Start again in a new --workdir with a lower --config.train.learning_rate or "
          "--config.train.clip_norm, or more warmup_steps."
        )
      speed = clock.tick(float(metrics["tokens"]))
      zeros = float(metrics["zero_fraction"])
      pace = f"{speed:,.0f} tokens/s" if speed else "compiled"
      bar.update(step, f"loss {loss:.3f}  {pace}  zeros {zeros:.1%}")
      if step % settings.log_every == 0 or step == settings.steps:
        facts = {"tokens_per_second": speed, "data_wait_fraction": clock.waited_fraction()}
        writer.write(step, {"loss": loss, **metrics, **facts})

    try:
      with ProgressLine(console, title, start, settings.steps) as bar:
        for step in range(start + 1, settings.steps + 1):
          with clock.waiting():
            batch = sharding.place(next(data), mesh)
          state, metrics = train_step(state, batch)
          if unread:
            report(**unread)
          tokens_seen += settings.batch_size * settings.seq_len
          unread = {"step": step, "metrics": {**metrics, "tokens_seen": tokens_seen}}
          last = step == settings.steps
          if last or step % settings.checkpoint_every == 0 or step % settings.eval_every == 0:
            report(**unread)  # before anything is kept of this step, its loss is known to be finite
            unread = {}
          if last or step % settings.eval_every == 0:
            held_out = evaluate(run.model, state.params, validation, mesh)
            writer.write(step, {"validation_loss": held_out.loss, "validation_zero_fraction": held_out.zero_fraction})
          if last or step % settings.checkpoint_every == 0:
            checkpoint.save(checkpoints, state, data.state(), tokens_seen)
          if not unread:
            clock.restart()
    finally:
      writer.close()


def data_seed(seed: int, tokens_seen: int) -> int:
  """Seed of the order of the data: another for a model that has been trained before, lest it meet the same batches."""
  return int(np.random.SeedSequence([seed, tokens_seen]).generate_state(1)[0])


class Clock:
  """Tokens per second of the steps alone, smoothed over about 20 of them, and the share of time spent on data."""

  def __init__(self):
    self._last = self._seconds = None
    self._waited, self._logged = 0.0, time.monotonic()

  def tick(self, tokens: float) -> float:
    """Tokens per second, `tokens` having been processed since the last tick; 0 at the first, which compiles."""
    now = time.monotonic()
    if self._last is not None:
      seconds = now - self._last
      self._seconds = 0.95 * self._seconds + 0.05 * seconds if self._seconds else seconds
    self._last = now
    return tokens / self._seconds if self._seconds else 0.0

  def restart(self):
    """Leaves out the time since the last tick: an evaluation or a checkpoint."""
    self._last = time.monotonic()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """A context whose time counts as waiting for data."""
    entered = time.monotonic()
    yield
    self._waited += time.monotonic() - entered

  def waited_fraction(self) -> float:
    """Share of the time since the last call that was spent waiting for data."""
    now = time.monotonic()
    fraction = self._waited / (now - self._logged)
    self._waited, self._logged = 0.0, now
    return fraction
