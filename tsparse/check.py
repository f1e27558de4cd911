"""Everything that can be known to be wrong with an experiment before memory is allocated or a file is written."""

import dataclasses
from pathlib import Path

import jax
import ml_collections

from tsparse import sharding
from tsparse.convert.model import Model, open_model
from tsparse.data import check_data, data_settings, lanes_of, load_tokenizer, same_tokenizer
from tsparse.errors import UserError
from tsparse.models.attention import has_kernel, make_rule
from tsparse.models.config import ModelConfig, model_config
from tsparse.models.moe import ONLY_ON
from tsparse.models.transformer import remat_policy
from tsparse.recipes import start, thresholds, trained
from tsparse.recipes.recipe import DENSE, recipe_of
from tsparse.train import memory
from tsparse.train.loop import prepare
from tsparse.train.optimizer import OPTIMIZERS
from tsparse.train.step import ROUTER_LOSSES
from tsparse.train.tracker import check_installed

SECTIONS = ("name", "seed", "init", "activation", "smaller", "model", "data", "train", "sparsity", "mesh", "analysis")
POSITIVE = (
  "steps", "batch_size", "seq_len", "microbatches", "learning_rate", "clip_norm", "log_every", "checkpoint_every",
  "keep_checkpoints", "eval_every", "eval_batches",
)  # fmt: skip
OF_ROUTERS = (*ROUTER_LOSSES, "router_jitter")
NOT_NEGATIVE = (
  "keep_every", "warmup_steps", "final_learning_rate_fraction", "weight_decay", "z_loss", *OF_ROUTERS,
)  # fmt: skip
# Fields of a model that may differ between a checkpoint and the experiment that starts from it.
FREE_FIELDS = ("activation", "dtype", "remat", "max_seq_len", "moe_impl", "attention_impl")


def check_sections(config: ml_collections.ConfigDict):
  """Raises UserError when `config` is no experiment at all."""
  missing = [name for name in SECTIONS if name not in config]
  if missing:
    raise UserError(f"the config has no {', '.join(missing)}: start it from configs/default.py, get_config().")


def check(config: ml_collections.ConfigDict):
  """Raises UserError for everything about `config` that can be known to be wrong before memory is allocated."""
  try:
    mesh = sharding.make_mesh(config.mesh)
  except UserError as error:
    hint = f" For this machine try --config={config.smaller}." if config.smaller else ""
    raise UserError(f"{error}{hint}") from None
  platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
  needed = check_step(config, mesh, platform)
  memory.check_fits(needed, memory.device_bytes(jax.local_devices()), config.name, config.smaller, config.model.remat)
  if config.init:
    check_init(open_model(Path(config.init)), config, model_config(config))
  if "control" in config and config.control.get("workdir", ""):
    check_init(open_model(Path(config.control.workdir)), config, model_config(config), "control.workdir")
  check_recipe(config)
  data = data_settings(config.data)
  data = dataclasses.replace(data, lanes=lanes_of(config.train.batch_size, data.lanes))
  check_data(data, config.model.vocab_size)
  check_installed(config.get("wandb", ""))


def check_step(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, platform: str) -> dict[str, int]:
  """What a step of `config` needs on `mesh` (memory.training_bytes); UserError if there can be no such step.

  `platform` is what it is compiled for: cpu, cuda or tpu.
  """
  settings = config.train
  for key in POSITIVE:
    if not 0 < settings[key] < float("inf"):
      raise UserError(f"config.train.{key} is {settings[key]}; it must be positive and finite.")
  for key in NOT_NEGATIVE:
    if not 0 <= settings[key] < float("inf"):
      raise UserError(f"config.train.{key} is {settings[key]}; it must not be negative, and finite.")
  if settings.final_learning_rate_fraction > 1:
    raise UserError("config.train.final_learning_rate_fraction is above 1: the learning rate would rise, not decay.")
  if settings.optimizer not in OPTIMIZERS:
    raise UserError(f"config.train.optimizer is {settings.optimizer!r}; the optimizers are {', '.join(OPTIMIZERS)}.")
  if not 0 <= config.seed < 2**31:
    raise UserError(f"config.seed is {config.seed}; it must be at least 0 and below 2^31.")
  if not (0 <= settings.b1 < 1 and 0 <= settings.b2 < 1):
    raise UserError(f"config.train.b1 and b2 are {settings.b1} and {settings.b2}; each must be at least 0 and below 1.")
  if not all(isinstance(level, (int, float)) and 0 <= level < 1 for level in config.analysis.levels):
    raise UserError(f"config.analysis.levels is {config.analysis.levels}: a level is a share of zeros, 0 <= level < 1.")
  if config.analysis.tokens <= 0 or config.analysis.batch_size <= 0:
    raise UserError("config.analysis.tokens and config.analysis.batch_size must be positive.")
  if not 0 <= config.analysis.minutes < float("inf"):
    raise UserError(
      f"config.analysis.minutes is {config.analysis.minutes}; give a number of minutes, or 0 for no limit."
    )
  model = model_config(config)
  remat_policy(model.remat)
  check_experts(model, settings, platform)
  check_attention(model, settings.seq_len, platform)
  if settings.seq_len > model.max_seq_len:
    raise UserError(
      f"config.train.seq_len is {settings.seq_len} and the model is made for at most {model.max_seq_len} tokens: lower "
      "it, or raise --config.model.max_seq_len if you mean to train longer positions."
    )
  rows, left = divmod(settings.batch_size, settings.microbatches)
  if left:
    raise UserError(
      f"config.train.batch_size is {settings.batch_size}; it must be a multiple of config.train.microbatches, "
      f"{settings.microbatches}."
    )
  if 0 < model.num_experts < mesh.shape["expert"]:
    raise UserError(
      f"config.mesh.expert is {mesh.shape['expert']} and the model has {model.num_experts} experts: an expert is not "
      f"split over devices by this axis; set --config.mesh.expert={model.num_experts} and give the others to fsdp or "
      "tensor."
    )
  widths = (model.d_ff, model.num_shared_experts * model.shared_d_ff, model.dense_layers and model.dense_d_ff)
  for width in filter(None, widths):
    sharding.check_divisible(mesh, {"B": rows, **model.sizes, "F": width})
  sharding.check_divisible(mesh, {"B": config.analysis.batch_size})

  rows_per_device = rows // sharding.shard_count(mesh, "B")
  path = settings.distill_teacher
  run = prepare(config, mesh, open_model(Path(path)).config if path else None)
  own = run.teacher and run.teacher.own(run.own)
  return memory.training_bytes(model, run.target, rows_per_device, settings.seq_len, platform, mesh.shape, own)


def check_recipe(config: ml_collections.ConfigDict):
  """Raises UserError where the recipe needs a start, or a teacher, that is not there or is another."""
  recipe, train, sparsity = recipe_of(config), config.train, config.sparsity
  starts = config.init or "base" in config
  init = open_model(Path(config.init)).config if config.init else None
  before = init.activation if init else config.get("base", {}).get("activation")
  for name in ("swap_until", "start"):
    if sparsity[name] and not starts:
      raise UserError(
        f"config.sparsity.{name} is {sparsity[name]!r} and there is no config.init to swap the activation of."
      )
  if sparsity.swap_until and before != DENSE:
    raise UserError(f"config.sparsity.swap_until is {sparsity.swap_until} and config.init is {before}, not {DENSE}.")
  given = (init and init.hidden_thresholds) or sparsity.threshold or "thresholds" in start.parse(sparsity.start)
  learned = not recipe.zeros and thresholds.learned(trained.parse(train.rules))
  if config.model.hidden_thresholds and learned and not given:
    raise UserError(
      "config.sparsity.threshold is 0 and the thresholds of the hidden are to be learned: at 0 they have no gradient. "
      "Start them above it, as by --config.sparsity.threshold=0.02, or give a sparsity.target and let that move them "
      "(--config.sparsity.moves=thresholds)."
    )
  if not recipe.teacher:
    return
  if not train.distill_teacher:
    if not starts:
      raise UserError(
        "config.train.distill_weight or match_until is set and there is no teacher: give a config.init, or a "
        "config.train.distill_teacher."
      )
    return
  teacher = open_model(Path(train.distill_teacher))
  if teacher.config.vocab_size != config.model.vocab_size or not same_tokenizer(
    load_tokenizer(teacher.vocabulary), load_tokenizer(config.data.vocabulary)
  ):
    raise UserError(
      f"config.train.distill_teacher {train.distill_teacher} has another vocabulary ({teacher.vocabulary!r}, "
      f"{teacher.config.vocab_size} ids) than the model ({config.data.vocabulary!r}, {config.model.vocab_size} ids): "
      "its logits are of other tokens; take a teacher with the same tokenizer."
    )
  shape = [getattr(each, name) for name in ("num_layers", "d_model", "num_experts", "dense_layers")
           for each in (teacher.config, model_config(config))]  # fmt: skip
  if recipe.match_steps and shape[::2] != shape[1::2]:
    raise UserError(
      f"config.train.match_until is set and config.train.distill_teacher {train.distill_teacher} is of another shape: "
      "FFNs are matched layer by layer; set it to 0."
    )


def check_experts(model: ModelConfig, settings: ml_collections.ConfigDict, platform: str):
  """Raises UserError for an implementation the platform lacks, and for settings of routers that cannot be."""
  if model.num_experts and platform != ONLY_ON.get(model.moe_impl, platform):
    raise UserError(
      f"config.model.moe_impl {model.moe_impl} runs on TPUs only and this is a {platform}, for which XLA has no "
      "ragged-all-to-all: set --config.model.moe_impl=ep_allgather, which keeps experts where they are too."
    )
  of_routers = [f"config.train.{name}={settings[name]}" for name in OF_ROUTERS if settings[name]]
  if of_routers and not model.num_experts:
    raise UserError(f"{', '.join(of_routers)}: the model has no experts, hence no routers; leave it at 0.")
  if settings.router_jitter >= 1:
    raise UserError(f"config.train.router_jitter is {settings.router_jitter}; it must be below 1.")


def check_attention(model: ModelConfig, seq_len: int, platform: str):
  """Raises UserError for a kernel of attention that the platform lacks for such a model."""
  if model.attention_impl == "auto":
    return
  rules = {make_rule(seq_len, model.head_dim, window, 0, model.attention_softcap, "triton") for window in model.windows}
  if platform != "cuda" or not all(has_kernel(platform, rule, model.dtype) for rule in rules):
    raise UserError(
      "config.model.attention_impl triton is for GPUs, bfloat16, no softcap and no window shorter than the row, and "
      f"this is a {platform} and a model in {model.dtype}: leave it at auto."
    )


def check_init(init: Model, config: ml_collections.ConfigDict, model: ModelConfig, field: str = "init"):
  """Raises UserError when the checkpoint `init` of `config.FIELD` is of another architecture or vocabulary."""
  free = (*FREE_FIELDS, *([] if init.config.hidden_thresholds else ["hidden_thresholds"]))  # it may get some
  changed = [
    f"{field.name} is {getattr(init.config, field.name)} there and {getattr(model, field.name)} here"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in free and getattr(init.config, field.name) != getattr(model, field.name)
  ]
  if changed:
    raise UserError(
      f"config.{field} {init.path} holds another architecture: {', '.join(changed)}. Set config.model to "
      "the checkpoint's."
    )
  theirs, ours = init.vocabulary, config.data.vocabulary
  if not same_tokenizer(load_tokenizer(theirs), load_tokenizer(ours)):
    raise UserError(
      f"config.{field} {init.path} was trained with the vocabulary {theirs!r} and config.data.vocabulary is {ours!r}: "
      "token ids would mean other things; use the checkpoint's."
    )
