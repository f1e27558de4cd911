"""The training loop: from a config to the checkpoints of a workdir."""

import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping, Sequence
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

from tsparse import hosts, sharding
from tsparse.data import account_metrics, data_settings, lanes_of, merge_positions, train_iterator
from tsparse.data.iterator import TrainIterator
from tsparse.errors import RunFailure, Stopped
from tsparse.evaluate.perplexity import evaluate
from tsparse.models.config import ModelConfig, ffn_layers, model_config
from tsparse.models.transformer import Transformer, abstract_parameters, init_parameters
from tsparse.progress import ProgressLine, warn
from tsparse.recipes import guards, thresholds
from tsparse.recipes import start as recipes_start
from tsparse.recipes.recipe import DENSE, Recipe, recipe_of
from tsparse.recipes.teacher import Teacher, teacher_of
from tsparse.train import checkpoint, failure
from tsparse.train.clock import Clock
from tsparse.train.log import MetricWriter, count_unscored
from tsparse.train.optimizer import learning_rate, make_optimizer, optimizer_shardings, warmup_steps
from tsparse.train.resume import restore_newest
from tsparse.train.saver import Saver
from tsparse.train.step import ROUTER_LOSSES, TrainState, make_train_step
from tsparse.train.stop import StopRequest
from tsparse.train.tracker import Tracker

UNROLLED = 12  # layers at most, on one CPU device: 4 seconds of compilation each, with experts (`Transformer.unroll`)

# (tree of ShapeDtypeStruct with shardings) -> (parameters, tokens they have seen)
Restore = Callable[[Any], tuple[Any, int]]


@dataclasses.dataclass(frozen=True)
class Source:
  """A stored model that training reads: where it starts, or its teacher.

  Attributes:
    restore: its parameters.
    config: what it is, its own activation included.
  """

  restore: Restore
  config: ModelConfig


@dataclasses.dataclass(frozen=True)
class Run:
  """A model, its optimizer and where their arrays live; nothing is allocated yet.

  Attributes:
    model: the decoder.
    tx: its optimizer.
    target: ShapeDtypeStructs with shardings.
    recipe: None where there is none.
    teacher: None where the recipe has none.
    own: ShapeDtypeStructs of the parameters that the teacher alone has, with shardings.
  """

  model: Transformer
  tx: optax.GradientTransformation
  target: TrainState
  recipe: Recipe | None = None
  teacher: Teacher | None = None
  own: Any = None


@dataclasses.dataclass
class Start:
  """Where training begins or goes on: after `step`, with the data at the batch that follows."""

  step: int
  state: TrainState
  data: TrainIterator
  tokens_seen: int


def prepare(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, teacher: ModelConfig | None = None) -> Run:
  """Builds the model and the abstract state of `config` on `mesh`.

  Args:
    config: the experiment.
    mesh: the devices.
    teacher: what the recipe's teacher is, if it has one; None for the model with the activation swiglu.
  """
  one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
  model = model_config(config)
  model = Transformer(model, unroll=one_cpu and model.num_layers <= UNROLLED)
  recipe = recipe_of(config)
  shapes, logical = abstract_parameters(model)
  shardings = sharding.shardings(mesh, logical)
  tx = make_optimizer(config.train, shapes, moved=thresholds.PATHS if recipe.zeros else "", seed=config.seed)
  replicated = NamedSharding(mesh, P())
  target = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    params=checkpoint.abstract(shapes, shardings),
    opt_state=checkpoint.abstract(
      jax.eval_shape(tx.init, shapes), optimizer_shardings(tx, shapes, shardings, replicated)
    ),
    memory=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), jax.eval_shape(recipe.init)
    ),
  )
  if not recipe.on:
    return Run(model, tx, target)
  if not recipe.teacher:
    return Run(model, tx, target, recipe)
  theirs = teacher or dataclasses.replace(model.config, activation=DENSE, hidden_thresholds=False)
  teacher = teacher_of(
    theirs,
    model.config,
    config.train.rules,
    shapes,
    is_start=not config.train.distill_teacher,
    made_ready=bool(config.sparsity.start),
  )
  shapes, logical = abstract_parameters(teacher.model)
  own = checkpoint.abstract(shapes, sharding.shardings(mesh, logical))
  return Run(model, tx, target, recipe, teacher, own)


def compiled_step(run: Run, config: ml_collections.ConfigDict) -> Callable:
  """The jitted training step (state, batch) -> (state, metrics) of `config`; the state is given away.

  With a teacher it is (state, batch, parameters that are the teacher's own).
  """
  settings = config.train
  step = make_train_step(
    run.model,
    run.tx,
    learning_rate(settings),
    weights={name: settings[name] for name in ("z_loss", *ROUTER_LOSSES)},
    router_jitter=settings.router_jitter,
    seed=config.seed,
    microbatches=settings.microbatches,
    recipe=run.recipe,
    teacher=run.teacher,
  )
  # of several hosts each must be able to read all of the metrics
  everywhere = (jax.tree.map(lambda x: x.sharding, run.target), run.target.step.sharding)
  return jax.jit(step, donate_argnums=0, out_shardings=everywhere)


def initial_state(
  run: Run,
  seed: int,
  init: Restore | None,
  ready: Callable[[Any, int], Any] = lambda params, _: params,
  threshold: float = 0.0,
) -> tuple[TrainState, int]:
  """Step 0 and the tokens seen so far: parameters by `init`, or random when None; a fresh optimizer.

  `ready` is what is done to the parameters of an init, (parameters, tokens seen) -> parameters, and `threshold` what
  the thresholds of the hidden of a random model are, if it has some.
  """
  tokens_seen = 0
  if init is None:
    kinds = ffn_layers(run.model.config) if run.model.config.hidden_thresholds else {}
    theta = {kind: jnp.full((length,), threshold, jnp.float32) for kind, length in kinds.items()}
    make = jax.jit(
      lambda key: thresholds.put(init_parameters(run.model, key), theta),
      out_shardings=jax.tree.map(lambda x: x.sharding, run.target.params),
    )
    params = make(jax.random.key(seed))
  else:
    params, tokens_seen = init(run.target.params)
    params = ready(params, tokens_seen)
  make = jax.jit(run.tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, run.target.opt_state))
  step = jax.device_put(np.zeros((), np.int32), run.target.step.sharding)
  memory = run.recipe and run.recipe.init()
  memory = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), memory, run.target.memory)
  return TrainState(step=step, params=params, opt_state=make(params), memory=memory), tokens_seen


def first_rows(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, seed: int, tokens: int) -> dict[str, Any]:
  """Rows of the training data in one batch [B, T], of `tokens` tokens or a little more; with the seed of a training
  those that it reads first."""
  settings = config.train
  data = train_iterator(
    data_settings(config.data, embedded=config.model.vocab_size),
    seq_len=settings.seq_len,
    batch_size=settings.batch_size,
    seed=seed,
    rows=sharding.local_rows(mesh, settings.batch_size),
  )
  rows, divisor = -(-tokens // settings.seq_len), sharding.shard_count(mesh, "B")
  batches = [next(data) for _ in range(-(-rows // settings.batch_size))]
  rows = min(-(-rows // divisor) * divisor, settings.batch_size * len(batches))
  return {name: np.concatenate([batch[name] for batch in batches])[:rows] for name in batches[0]}


def made_ready(
  run: Run, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, source: Source, params: Any, tokens_seen: int
) -> Any:
  """The parameters of an init as `config.sparsity.start` has them made ready, by the first rows training will read."""
  steps = recipes_start.parse(config.sparsity.start)
  of_model = run.model.config.activation, run.model.config.hidden_thresholds
  if not steps or (source.config.activation, source.config.hidden_thresholds) == of_model:
    return params
  batch = first_rows(config, mesh, data_seed(config.seed, tokens_seen), recipes_start.TOKENS)
  before = {name: getattr(source.config, name) for name in ("activation", "hidden_thresholds")}
  old = Transformer(dataclasses.replace(run.model.config, **before))
  params = recipes_start.start(old, run.model, params, sharding.place(batch, mesh), steps, config.sparsity.target)
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, run.target.params)


def begin(
  config: ml_collections.ConfigDict,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  run: Run,
  init: Source | None,
  warn: Callable[[str], None],
) -> Start:
  """The newest whole checkpoint of `workdir`, or step 0 where there is none."""
  settings = config.train
  found = restore_newest(workdir, run.target, warn)
  if found:
    step, state, tokens_seen = found.step, found.state, found.tokens_seen
  else:
    ready = functools.partial(made_ready, run, config, mesh, init)
    step, (state, tokens_seen) = (
      0,
      initial_state(run, config.seed, init and init.restore, ready, config.sparsity.threshold),
    )
  data = train_iterator(
    data_settings(config.data, embedded=config.model.vocab_size),
    seq_len=settings.seq_len,
    batch_size=settings.batch_size,
    seed=data_seed(config.seed, tokens_seen - step * settings.batch_size * settings.seq_len),
    rows=sharding.local_rows(mesh, settings.batch_size),
  )
  if found:
    data.restore(found.position)
  return Start(step, state, data, tokens_seen)


def train(
  config: ml_collections.ConfigDict,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  validation: Sequence[dict[str, np.ndarray]],
  console: Console,
  title: str,
  init: Source | None = None,
  by_source: Mapping[str, Sequence[dict[str, np.ndarray]]] | None = None,
  teacher: Source | None = None,
) -> None:
  """Trains what `config` says, resuming from the newest whole checkpoint of `workdir` if there is one.

  Args:
    config: the whole experiment; `model`, `activation`, `data`, `train` and `seed` are read.
    workdir: where checkpoints and metrics go.
    mesh: the devices; it must be set by `jax.set_mesh`.
    validation: batches for the loss on held-out text every `eval_every` steps.
    console: where progress is shown.
    title: what progress calls this stage.
    init: gives the parameters to start from; None starts from random ones.
    by_source: the same as `validation` for each source of a mixture.
    teacher: whom a recipe that has one learns from.

  Raises:
    RunFailure: the loss or the gradient is not finite, or the last checkpoint cannot be saved.
    Stopped: by a signal; the checkpoint is saved.
    UserError: there are checkpoints, and none is whole.
  """
  settings = config.train
  run = prepare(config, mesh, teacher and teacher.config)
  train_step = compiled_step(run, config)
  if run.teacher:
    own = run.teacher.own(teacher.restore(run.own)[0])
    train_step = functools.partial(_with, train_step, own)

  tell = functools.partial(warn, console)
  start = begin(config, workdir, mesh, run, init, tell)
  if sentence := adapted(config):
    console.print(f"{title}  {sentence}", highlight=False, soft_wrap=True)
  if start.step:
    console.print(f"{title}  resumed at step {start.step} of {settings.steps}", highlight=False)
  held_out = validation, by_source or {}
  bad = run_steps(config, workdir, mesh, run.model, train_step, start, *held_out, console, title)
  if bad is None:
    return
  del start  # its arrays make room for those of the repetition
  loss, grad_norm = float(bad.metrics["loss"]), float(bad.metrics["grad_norm"])
  console.print(f"{title}  step {bad.step} is not finite; repeating it from the last checkpoint", highlight=False)
  kept = failure.keep(workdir, begin(config, workdir, mesh, run, init, tell), train_step, mesh, bad)
  raise RunFailure(
    f"{title}: loss {loss} and gradient norm {grad_norm} at step {bad.step} are not finite; no checkpoint has them. "
    f"{kept} Start again in a new --workdir with a lower --config.train.learning_rate or --config.train.clip_norm, or "
    "more warmup_steps."
  )


def adapted(config: ml_collections.ConfigDict) -> str:
  """What is taken in place of what the config asks for, where its steps or its rows are too few; "" for nothing."""
  settings, asked = config.train, data_settings(config.data).lanes
  warmup, lanes = warmup_steps(settings), lanes_of(settings.batch_size, asked)
  parts = []
  if warmup != settings.warmup_steps:
    parts.append(f"train.warmup_steps is {warmup}, as {settings.warmup_steps} do not fit in {settings.steps} steps")
  if lanes != asked:
    parts.append(f"data.lanes is {lanes}, as {asked} do not divide a batch of {settings.batch_size} rows")
  return "; ".join(parts)


def _with(train_step: Callable, own: Any, state: TrainState, batch: dict[str, jax.Array]) -> Any:
  return train_step(state, batch, own)


def run_steps(
  config: ml_collections.ConfigDict,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  model: Transformer,
  train_step: Callable,
  start: Start,
  validation: Sequence[dict[str, np.ndarray]],
  by_source: Mapping[str, Sequence[dict[str, np.ndarray]]],
  console: Console,
  title: str,
) -> failure.BadStep | None:
  """The steps of `train`, to the last; the first one whose loss or gradient is not finite ends them and is returned."""
  settings = config.train
  state, data, tokens_seen = start.state, start.data, start.tokens_seen
  start.state = None  # it is donated to the first step

  tell = functools.partial(warn, console)
  clock = Clock()
  unread: dict[str, Any] = {}
  writer = None
  if hosts.is_main():
    tracker = Tracker(workdir, config, tell) if config.get("wandb") else None
    writer = MetricWriter(workdir, start.step, tell, tracker)
  dead_after, told = config.sparsity.dead_after, set()

  def log(step: int, metrics: dict[str, Any]):
    if writer:
      writer.write(step, metrics)

  def report(step: int, metrics: dict[str, Any]):
    """Reads the metrics of a dispatched step, preferably not of the newest one, so that the device stays busy."""
    if not failure.is_finite(metrics):
      raise failure.NotFinite(step, metrics)
    unscored = metrics["scored_tokens"] == 0
    speed, slow = clock.tick(float(metrics["tokens"]))
    zeros = float(metrics["zero_fraction"])
    pace = f"{speed:,.0f} tokens/s" if speed else "compiled"
    loss = "no token scored" if unscored else f"loss {float(metrics['loss']):.3f}"
    bar.update(step, f"{loss}  {pace}  zeros {zeros:.1%}")
    if unscored and "unscored" not in told:
      told.add("unscored")
      tell(f"no token of step {step} is scored: the step makes no update and has no loss. Such steps are counted.")
    if unscored or step % settings.log_every == 0 or step == settings.steps:
      facts = {"tokens_per_second": speed, "data_wait_fraction": clock.waited_fraction()}
      log(step, {**metrics, **facts})
      for sentence in guards.alarms(metrics, told, dead_after) if dead_after else ():
        tell(f"step {step}: {sentence}")
    if slow:
      seconds, median = slow
      tell(f"step {step} took {seconds:.1f} s, {seconds / median:.0f} times the median of {median:.3g} s.")
      log(step, {"slow_step_seconds": seconds, "median_step_seconds": median})

  try:
    with (
      Saver(workdir, settings.keep_checkpoints, settings.keep_every, tell) as saver,
      ProgressLine(console, title, start.step, settings.steps) as bar,
      StopRequest(mesh, console) as stop,
    ):
      for step in range(start.step + 1, settings.steps + 1):
        with clock.waiting(unread["metrics"]["loss"] if unread else None):
          batch = sharding.place(next(data), mesh)
        state, metrics = train_step(state, batch)
        stopping = stop.agreed()
        if unread:
          report(**unread)
        tokens_seen += settings.batch_size * settings.seq_len
        last = step == settings.steps
        drawn = account_metrics(hosts.gather(data.tally())) if last or step % settings.log_every == 0 else {}
        unread = {"step": step, "metrics": {**metrics, **drawn, "tokens_seen": tokens_seen}}
        evaluating = last or step % settings.eval_every == 0
        kept = settings.keep_every and step % settings.keep_every == 0
        saving = last or stopping or kept or step % settings.checkpoint_every == 0
        if evaluating or saving:
          report(**unread)  # before anything is kept of this step, its loss is known to be finite
          unread = {}
        if evaluating:
          held_out = evaluate(model, state.params, validation, mesh)
          quality = {"validation_loss": held_out.loss, "validation_zero_fraction": held_out.zero_fraction}
          for name, batches in by_source.items():
            quality[f"validation_loss/{name}"] = evaluate(model, state.params, batches, mesh).loss
          log(step, quality)
        if saving:
          saver.save(state, merge_positions(hosts.gather(data.state())), tokens_seen)
        else:
          saver.poll()
        if not unread:
          clock.restart()
        if stopping:
          saver.finish()
          raise Stopped(
            f"{title}: {stop.signal.name}; the checkpoint of step {step} of {settings.steps} is saved in {workdir}, "
            "and the same command goes on from there.",
            0 if stop.signal == signal.SIGTERM else 130,
          )
      saver.finish()
      if number := count_unscored(workdir) if hosts.is_main() else 0:
        tell(f"{number} of {settings.steps} steps had no scored token and made no update: look at the loss masks.")
  except failure.NotFinite as bad:
    return failure.BadStep(bad.step, bad.metrics)
  finally:
    if writer:
      writer.close()
  return None


def data_seed(seed: int, tokens_seen: int) -> int:
  """Seed of the order of the data: another for a model that has been trained before, lest it meet the same batches."""
  return int(np.random.SeedSequence([seed, tokens_seen]).generate_state(1)[0])
