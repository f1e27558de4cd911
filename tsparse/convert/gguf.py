"""GGUF files: llama.cpp's, of dense computation, and PowerInfer's, which hold neuron predictors.

Both are GGUF version 3, little-endian, tensors at multiples of 32 bytes. Matrices keep their dtype or get the one asked
for; norms, biases and routers are float32. llama.cpp pairs neighbouring entries of a head for rotary positions where
Hugging Face and we pair those half a head apart, so that in its `llama` architecture the rows of queries and keys are
interleaved.

PowerInfer's file (github.com/SJTU-IPADS/PowerInfer) differs in that
- its first four bytes are PWRI in place of GGUF, which switches sparse inference on;
- the architecture says the activation: `llama` is ReGLU, `bamboo` dReLU;
- `down` is stored as ffn_down_t [F, D], a row for each neuron, and there is always an output.weight;
- fc1 [R, D] and fc2 [F, R] are the predictor of a layer, which reads the residual stream before the FFN's norm. A
  neuron is computed where its logit >= powerinfer.sparse_threshold, one number for all layers; with us where it is
  above a threshold of its layer, so that fc2 is scaled where those differ.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tsparse.convert import rules
from tsparse.convert.families import family_of
from tsparse.convert.gguf_vocabulary import Vocabulary, read_vocabulary
from tsparse.convert.leaf import Leaf, cast
from tsparse.convert.model import Model
from tsparse.convert.rules import Rule
from tsparse.data.encoding import load_tokenizer
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig
from tsparse.models.rope import parse_scaling, rotary_frequencies
from tsparse.sparse.predictors.stored import without_predictors

BLOCK = "blk.{layer}."
COMMON = (
  Rule("embed", "token_embd.weight", "V D -> V D"),
  Rule("final_norm", "output_norm.weight", "D -> D"),
  Rule("layers/attention_norm", BLOCK + "attn_norm.weight", "D -> D"),
  Rule("layers/ffn_norm", BLOCK + "ffn_norm.weight", "D -> D"),
  Rule("layers/attention/value", BLOCK + "attn_v.weight", "(K H) D -> D K H"),
  Rule("layers/attention/out", BLOCK + "attn_output.weight", "D (N H) -> N H D"),
)
# Entry i of the first half of a head (P = 2 halves of J) goes beside entry i of the second.
INTERLEAVED = (
  Rule("layers/attention/query", BLOCK + "attn_q.weight", "(N J P) D -> D N (P J)"),
  Rule("layers/attention/key", BLOCK + "attn_k.weight", "(K J P) D -> D K (P J)"),
)
IN_HALVES = (
  Rule("layers/attention/query", BLOCK + "attn_q.weight", "(N H) D -> D N H"),
  Rule("layers/attention/key", BLOCK + "attn_k.weight", "(K H) D -> D K H"),
)
BIAS = tuple(
  Rule(f"layers/attention/{ours}_bias", BLOCK + f"attn_{theirs}.bias", f"({heads} H) -> {heads} H")
  for ours, theirs, heads in (("query", "q", "N"), ("key", "k", "K"), ("value", "v", "K"))
)
GATE_UP = (
  Rule("layers/ffn/gate", BLOCK + "ffn_gate.weight", "F D -> D F"),
  Rule("layers/ffn/up", BLOCK + "ffn_up.weight", "F D -> D F"),
)
DOWN = (Rule("layers/ffn/down", BLOCK + "ffn_down.weight", "D F -> F D"),)
EXPERTS = (
  Rule("layers/ffn/router", BLOCK + "ffn_gate_inp.weight", "E D -> D E"),
  Rule("layers/ffn/gate", BLOCK + "ffn_gate_exps.weight", "E F D -> E D F"),
  Rule("layers/ffn/up", BLOCK + "ffn_up_exps.weight", "E F D -> E D F"),
  Rule("layers/ffn/down", BLOCK + "ffn_down_exps.weight", "E D F -> E F D"),
)
NEURONS = (
  Rule("layers/ffn/down", BLOCK + "ffn_down_t.weight", "F D -> F D"),
  Rule("layers/ffn/predictor/fc1", BLOCK + "fc1.weight", "R D -> D R"),
  Rule("layers/ffn/predictor/fc2", BLOCK + "fc2.weight", "F R -> R F"),
)
HEAD = Rule("head", "output.weight", "V D -> D V")
TIED_HEAD = Rule("embed", "output.weight", "V D -> V D")

# families.family_of -> (general.architecture, rules); SwiGLU is all that llama.cpp computes in these
LLAMA_CPP = {
  "llama": ("llama", COMMON + INTERLEAVED + GATE_UP + DOWN),
  "mistral": ("llama", COMMON + INTERLEAVED + GATE_UP + DOWN),
  "mixtral": ("llama", COMMON + INTERLEAVED + EXPERTS),
  "qwen2": ("qwen2", COMMON + IN_HALVES + BIAS + GATE_UP + DOWN),
}
POWERINFER = {"relu": "llama", "drelu": "bamboo"}  # activation -> general.architecture
POWERINFER_FAMILIES = ("llama", "mistral")
FLOAT32 = np.dtype("float32")
# dtype -> (its name in gguf.GGMLQuantizationType, the file's in gguf.LlamaFileType)
TYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}
ALIGNMENT = 32  # bytes
ROWS = 1024  # of a matrix, cast at a time
LARGEST = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A GGUF file that can be written.

  Attributes:
    file: its name.
    magic: its first four bytes.
    architecture: general.architecture.
    tensors: name -> Leaf of depth 0, in the order and the dtypes of the file.
    fields: what is called of a gguf.GGUFWriter, with its argument: `add_<name>(value)`.
    vocabulary: the tokenizer.
    threshold: powerinfer.sparse_threshold; None is 0.
    warnings: sentences on what the file cannot say.
  """

  file: str
  magic: bytes
  architecture: str
  tensors: Mapping[str, Leaf]
  fields: Mapping[str, Any]
  vocabulary: Vocabulary
  threshold: float | None = None
  warnings: tuple[str, ...] = ()


def plan_llama_cpp(model: Model, leaves: Mapping[str, Leaf], dtype: str) -> Plan:
  """The stock GGUF of a model.

  Args:
    model: its config, vocabulary and path.
    leaves: its parameters.
    dtype: a key of TYPES for its matrices; "" keeps each as it is.

  Raises:
    UserError: llama.cpp has no architecture that computes such a model.
  """
  config, form = model.config, "--format=gguf"
  kind = family_of(without_predictors(config))
  if kind not in LLAMA_CPP:
    raise UserError(f"{form} writes models like {', '.join(LLAMA_CPP)}; {model.path} is like {kind}: use --format=hf.")
  unknown = {
    f"the activation {config.activation}": config.activation != "swiglu",
    "neuron predictors": config.predictor_ranks,
    "thresholds of the hidden": config.hidden_thresholds,
  }
  if what := next((what for what, there in unknown.items() if there), ""):
    raise UserError(
      f"{form}: llama.cpp computes SwiGLU in such models and knows nothing of {what}: use --format=powerinfer (drelu, "
      "relu) or --format=hf."
    )
  architecture, ours = LLAMA_CPP[kind]
  tensors = rules.to_theirs(ours + (() if config.tie_embeddings else (HEAD,)), config, leaves)
  fields, factors = rotary(config, form, ("linear", "llama3"))
  if factors is not None:
    tensors["rope_freqs.weight"] = Leaf(factors.shape, FLOAT32, 0, lambda _: factors)
  fields |= {"vocab_size": config.vocab_size, "key_length": config.head_dim, "value_length": config.head_dim}
  if config.num_experts:
    fields |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
  return _plan("model.gguf", b"GGUF", architecture, model, typed(tensors, dtype), fields)


def plan_powerinfer(model: Model, leaves: Mapping[str, Leaf], dtype: str) -> Plan:
  """PowerInfer's GGUF of a model with predictors; see `plan_llama_cpp`. The default of `dtype` is float16.

  Raises:
    UserError: PowerInfer computes no such model, or the model holds no predictors that it could use.
  """
  config, form = model.config, "--format=powerinfer"
  for holds, sentence in unfit_for_powerinfer(model, dtype):
    if holds:
      raise UserError(f"{form}: {sentence}.")
  ours = COMMON + INTERLEAVED + GATE_UP + NEURONS + (TIED_HEAD if config.tie_embeddings else HEAD,)
  tensors = rules.to_theirs(ours, config, leaves)
  threshold = None
  if config.predictor_thresholds:
    threshold, factors = one_threshold(leaves["layers/ffn/predictor/threshold"].at(()))
    for layer, factor in enumerate(factors):
      name = BLOCK.format(layer=layer) + "fc2.weight"
      tensors[name] = scaled(tensors[name], factor)
  tensors = typed(tensors, dtype or "float16")
  fields, _ = rotary(config, form, ("linear",))
  plan = _plan("model.powerinfer.gguf", b"PWRI", POWERINFER[config.activation], model, tensors, fields)
  if plan.vocabulary.pre not in ("default", "gpt-2"):
    cut = plan.vocabulary.pre
    raise UserError(f"{form}: PowerInfer cuts text as GPT-2 does, and the vocabulary {model.vocabulary} as {cut} does.")
  halves = "PowerInfer's CPU kernel takes ffn_down_t for float16 unless it is quantised: quantise the file first."
  warnings = plan.warnings + ((halves,) if dtype == "float32" else ())
  return dataclasses.replace(plan, threshold=threshold, warnings=warnings)


def unfit_for_powerinfer(model: Model, dtype: str) -> list[tuple[bool, str]]:
  """(whether it holds, what is wrong and what to do) of all that PowerInfer may lack for a model."""
  config, path = model.config, model.path
  kind = family_of(without_predictors(config))
  known, computed = " and ".join(POWERINFER_FAMILIES), " and ".join(POWERINFER)
  return [
    (kind not in POWERINFER_FAMILIES, f"PowerInfer computes models like {known}, and {path} is like {kind}"),
    (
      config.activation not in POWERINFER,
      f"PowerInfer computes {computed}, and the activation of {path} is {config.activation}: give it zeros first "
      f"(experiments/run.py --config=configs/relufy.py:{path})",
    ),
    (
      config.hidden_thresholds,
      f"PowerInfer knows nothing of thresholds of the hidden, which {path} has: use --format=hf",
    ),
    (
      not config.predictor_ranks,
      f"PowerInfer wants a neuron predictor for each layer, and {path} has none: train them by "
      f"experiments/predictors.py --model={path}",
    ),
    (
      config.predictor_input == "after_norm",
      "PowerInfer's predictors read the residual stream before the norm, and these read it after: train others by "
      "experiments/predictors.py --input=before_norm",
    ),
    (
      config.d_model != config.num_heads * config.head_dim,
      f"PowerInfer has heads of d_model / num_heads = {config.d_model} / {config.num_heads} entries, and the model's "
      f"have {config.head_dim}",
    ),
    (dtype == "bfloat16", "PowerInfer reads no bfloat16: choose float16 or float32"),
  ]


def rotary(config: ModelConfig, form: str, known: tuple[str, ...]) -> tuple[dict[str, Any], np.ndarray | None]:
  """Fields of the rotary positions, and what their frequencies are divided by, [H/2], where that is a tensor.

  Raises:
    UserError: a scaling that is not among those `known`.
  """
  fields = {"rope_dimension_count": config.head_dim, "rope_freq_base": config.rope_theta}
  if not config.rope_scaling:
    return fields, None
  name, numbers = parse_scaling(config.rope_scaling)
  if name not in known:
    raise UserError(f"{form}: rotary positions scaled by {name} cannot be written, only by {', '.join(known)}.")
  if name == "linear":
    fields |= {"rope_scaling_type": _member("RopeScalingType", "LINEAR"), "rope_scaling_factor": numbers["factor"]}
    return fields, None
  plain, _ = rotary_frequencies(config.head_dim, config.rope_theta)
  scaled, _ = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
  return fields, (plain / scaled).astype(np.float32)


def one_threshold(thresholds: np.ndarray) -> tuple[float, np.ndarray]:
  """A threshold for all layers, and what the logits of each are multiplied by, [L]: logit > t where f logit > f t.

  Args:
    thresholds: [L] float32.

  Raises:
    UserError: some are negative and others not, which no positive factors make equal.
  """
  if (thresholds == thresholds[0]).all():
    return float(thresholds[0]), np.ones_like(thresholds)
  signs = np.sign(thresholds)
  if signs[0] == 0 or (signs != signs[0]).any():
    raise UserError(
      "--format=powerinfer: PowerInfer has one threshold for all layers, and those of the predictors are from "
      f"{thresholds.min():g} to {thresholds.max():g}, across 0: train them for a higher --recall, which lowers all."
    )
  threshold = signs[0] * np.exp(np.log(np.abs(thresholds)).mean())
  return float(threshold), threshold / thresholds


def scaled(leaf: Leaf, factor: float) -> Leaf:
  """The tensor times a number, in float32."""
  if factor == 1:
    return leaf
  return dataclasses.replace(leaf, dtype=FLOAT32, read=lambda _: leaf.read(()).astype(np.float32) * np.float32(factor))


def typed(tensors: Mapping[str, Leaf], dtype: str) -> dict[str, Leaf]:
  """The tensors in the dtypes of a file: vectors and routers float32, matrices `dtype`, "" as they are."""

  def one(name: str, leaf: Leaf) -> Leaf:
    if len(leaf.shape) == 1 or "ffn_gate_inp" in name:
      return cast(leaf, FLOAT32)
    return cast_within(name, leaf) if dtype == "float16" else cast(leaf, jnp.dtype(dtype)) if dtype else leaf

  return {name: one(name, leaf) for name, leaf in tensors.items()}


def cast_within(name: str, leaf: Leaf) -> Leaf:
  """The tensor as float16; reading it raises UserError where it holds more than float16 can."""

  def read(_: tuple) -> np.ndarray:
    whole = leaf.read(())
    narrow = np.empty(whole.shape, np.float16)
    source, target = (x.reshape(-1, x.shape[-1]) for x in (whole, narrow))
    for start in range(0, len(source), ROWS):  # not all at once in float32
      wide = source[start : start + ROWS].astype(np.float32)
      with np.errstate(over="ignore"):
        target[start : start + ROWS] = wide
      lost = np.isinf(target[start : start + ROWS]) & np.isfinite(wide)
      if lost.any():
        value = wide[lost][0]
        raise UserError(f"tensor {name} holds {value:g}, and float16 ends at {LARGEST:g}: choose --dtype=float32.")
    return narrow

  return dataclasses.replace(leaf, dtype=np.dtype("float16"), read=read)


def _plan(
  file: str, magic: bytes, architecture: str, model: Model, tensors: dict[str, Leaf], fields: Mapping[str, Any]
) -> Plan:
  config, length, warnings = model.config, model.config.max_seq_len, ()
  if 0 < config.sliding_window < length:
    length = config.sliding_window
    warnings = (f"the file says a context of {length} tokens, not {config.max_seq_len}: its readers know no windows.",)
  matrix = tensors[BLOCK.format(layer=0) + "attn_output.weight"].dtype.name
  fields = {
    "name": model.path.resolve().name,
    "file_type": _member("LlamaFileType", TYPES[matrix][1]),
    "context_length": length,
    "embedding_length": config.d_model,
    "block_count": config.num_layers,
    "feed_forward_length": config.d_ff,
    "head_count": config.num_heads,
    "head_count_kv": config.num_kv_heads,
    "layer_norm_rms_eps": config.norm_eps,
    **fields,
  }
  try:
    load_tokenizer(model.vocabulary)
  except UserError as error:
    raise UserError(f"a GGUF needs a tokenizer; name one by --tokenizer. {error}") from None
  vocabulary = read_vocabulary(model.vocabulary, config.vocab_size, model.bos)
  return Plan(file, magic, architecture, tensors, fields, vocabulary, warnings=warnings)


def _member(enumeration: str, name: str) -> Any:
  import gguf  # here, so that importing this module stays light

  return getattr(gguf, enumeration)[name]


def write(plan: Plan, tensors: Mapping[str, Leaf], folder: Path):
  """Writes the file; one tensor is in memory at a time.

  Args:
    plan: of the file.
    tensors: those of the plan.
    folder: exists.

  Raises:
    OSError: the disk is full, or fails otherwise.
    UserError: a tensor cannot be read, or does not fit its dtype.
  """
  import gguf

  path = folder / plan.file
  writer = gguf.GGUFWriter(path, plan.architecture)
  for name, value in {**plan.fields, **plan.vocabulary.fields()}.items():
    getattr(writer, f"add_{name}")(value)
  if plan.threshold is not None:
    writer.add_float32("powerinfer.sparse_threshold", plan.threshold)
  for name, leaf in tensors.items():
    kind = gguf.GGMLQuantizationType[TYPES[leaf.dtype.name][0]]
    writer.add_tensor_info(name, leaf.shape, leaf.dtype, leaf.nbytes, raw_dtype=kind)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
  finally:
    writer.close()
  with path.open("r+b") as file:  # not by the writer, which does not say why a disk took no more
    file.write(plan.magic)
    file.seek(0, os.SEEK_END)
    for leaf in tensors.values():
      file.write(bytes(-file.tell() % ALIGNMENT))
      file.write(leaf.read(()).view(f"u{leaf.dtype.itemsize}").data)
    file.write(bytes(-file.tell() % ALIGNMENT))
