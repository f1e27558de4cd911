"""Families of Hugging Face checkpoints: their tensors (rules) and the fields of their config.json."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsparse.convert.rope import read_rope, write_rope
from tsparse.convert.rules import Rule
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig

LAYER = "model.layers.{layer}."
ATTENTION = (
  Rule("embed", "model.embed_tokens.weight", "V D -> V D"),
  Rule("final_norm", "model.norm.weight", "D -> D"),
  Rule("layers/attention_norm", LAYER + "input_layernorm.weight", "D -> D"),
  Rule("layers/ffn_norm", LAYER + "post_attention_layernorm.weight", "D -> D"),
  Rule("layers/attention/query", LAYER + "self_attn.q_proj.weight", "(N H) D -> D N H"),
  Rule("layers/attention/key", LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
  Rule("layers/attention/value", LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
  Rule("layers/attention/out", LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
)
HEAD = Rule("head", "lm_head.weight", "V D -> D V")
FFN = (
  Rule("layers/ffn/gate", LAYER + "mlp.gate_proj.weight", "F D -> D F"),
  Rule("layers/ffn/up", LAYER + "mlp.up_proj.weight", "F D -> D F"),
  Rule("layers/ffn/down", LAYER + "mlp.down_proj.weight", "D F -> F D"),
)
MOE = LAYER + "block_sparse_moe."
EXPERTS = (
  Rule("layers/ffn/router", MOE + "gate.weight", "E D -> D E"),
  Rule("layers/ffn/gate", MOE + "experts.{expert}.w1.weight", "F D -> D F"),
  Rule("layers/ffn/up", MOE + "experts.{expert}.w3.weight", "F D -> D F"),
  Rule("layers/ffn/down", MOE + "experts.{expert}.w2.weight", "D F -> F D"),
)
# Tensors that old checkpoints hold and that are no parameters: they follow from the config.
IGNORED = (r".*rotary_emb\.inv_freq",)

# our field -> theirs, for all families
FIELDS = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "d_model": "hidden_size",
  "d_ff": "intermediate_size",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "max_seq_len": "max_position_embeddings",
  "norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
# Fields that do not change the forward pass.
NO_MATHS = {
  "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "dtype",
  "eos_token_id", "id2label", "initializer_range", "label2id", "model_type", "output_router_logits", "pad_token_id",
  "rope_parameters", "rope_scaling", "rope_theta", "router_aux_loss_coef", "torch_dtype", "transformers_version",
  "tsparse_vocabulary", "unk_token_id", "use_cache",
}  # fmt: skip
# Fields that would, by the only values that are supported.
ONLY = {"attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,), "router_jitter_noise": (0.0, None)}
BIAS = tuple(
  Rule(f"layers/attention/{ours}_bias", LAYER + f"self_attn.{theirs}_proj.bias", f"({heads} H) -> {heads} H")
  for ours, theirs, heads in (("query", "q", "N"), ("key", "k", "K"), ("value", "v", "K"))
)
QK_NORM = (
  Rule("layers/attention/query_norm", LAYER + "self_attn.q_norm.weight", "(N H) -> N H"),
  Rule("layers/attention/key_norm", LAYER + "self_attn.k_norm.weight", "(K H) -> K H"),
)
POST_NORMS = (
  Rule("layers/attention_post_norm", LAYER + "post_attention_layernorm.weight", "D -> D"),
  Rule("layers/ffn_norm", LAYER + "pre_feedforward_layernorm.weight", "D -> D"),
  Rule("layers/ffn_post_norm", LAYER + "post_feedforward_layernorm.weight", "D -> D"),
)
# hidden_act -> ours
ACTIVATIONS = {"silu": "swiglu", "relu": "relu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


@dataclasses.dataclass(frozen=True)
class Family:
  """A `model_type` of Hugging Face.

  Attributes:
    architecture: class name that goes with it.
    rules: its tensors but for the output head, which is there unless the embeddings are tied.
    fields: our field -> theirs, beyond FIELDS.
    defaults: values of their fields where config.json leaves them out.
    activations: hidden_act -> our activation.
    hidden_act: their field that says the activation.
    constants: our fields that are so in all its models.
    only: their fields that change the maths, by the only values supported.
    no_maths: their fields that do not, given `only`.
  """

  architecture: str
  rules: tuple[Rule, ...]
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: ACTIVATIONS)
  hidden_act: str = "hidden_act"
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  no_maths: tuple[str, ...] = ()


# The same experts by the names of a dense FFN: OLMoE's, and those of what we export beside MODELING.
PLAIN_EXPERTS = tuple(
  rule._replace(theirs=rule.theirs.replace("block_sparse_moe", "mlp").replace(short, long))
  for rule, (short, long) in zip(
    EXPERTS, [("", ""), ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")], strict=True
  )
)
WINDOW = {"sliding_window": "sliding_window"}
NULL_IS_ZERO = {"sliding_window", "attention_softcap", "final_softcap"}  # fields that are null in config.json for 0
FAMILIES = {
  # ReluLLaMA is a llama with hidden_act relu; ProSparse adds fatrelu with its threshold in hidden_act_param.
  "llama": Family("LlamaForCausalLM", ATTENTION + FFN, {}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
  "mistral": Family("MistralForCausalLM", ATTENTION + FFN, WINDOW, {"rms_norm_eps": 1e-6, "sliding_window": 4096}),
  "mixtral": Family(
    "MixtralForCausalLM",
    ATTENTION + EXPERTS,
    WINDOW | {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    ATTENTION + BIAS + FFN,
    {},
    {"rms_norm_eps": 1e-6},
    constants={"attention_bias": True},
    only={"use_sliding_window": (False,)},
    no_maths=("sliding_window", "max_window_layers", "layer_types"),
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    ATTENTION + QK_NORM + PLAIN_EXPERTS,
    {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok", "router_renormalize": "norm_topk_prob"},
    {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    constants={"qk_norm": True},
    only={"clip_qkv": (None,)},
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM",
    tuple(rule for rule in ATTENTION if rule.ours != "layers/ffn_norm") + POST_NORMS + FFN,
    WINDOW
    | {
      "attention_softcap": "attn_logit_softcapping",
      "final_softcap": "final_logit_softcapping",
      "query_scalar": "query_pre_attn_scalar",
    },
    {
      "rms_norm_eps": 1e-6,
      "tie_word_embeddings": True,
      "head_dim": 256,
      "max_position_embeddings": 8192,
      "sliding_window": 4096,
      "query_pre_attn_scalar": 256,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
      "hidden_activation": "gelu_pytorch_tanh",
    },
    hidden_act="hidden_activation",
    constants={"norm_offset": 1.0, "post_norms": True, "scale_embeddings": True, "full_attention_every": 2},
    only={"use_bidirectional_attention": (False, None)},
    no_maths=("cache_implementation", "layer_types", "sliding_window_size"),
  ),
  # Bamboo, the ancestor of TurboSparse-Mistral: hidden_act relu means dReLU there.
  "bamboo": Family(
    "BambooForCausalLM", ATTENTION + FFN, WINDOW, {"rms_norm_eps": 1e-6}, activations={"relu": "drelu"}
  ),
}  # fmt: skip


def rules_of(family: Family, config: ModelConfig) -> tuple[Rule, ...]:
  """All rules of a model of the family."""
  return family.rules if config.tie_embeddings else (*family.rules, HEAD)


def read_config(fields: Mapping[str, Any]) -> tuple[tuple[Rule, ...], ModelConfig]:
  """The rules and the model of a config.json.

  Raises:
    UserError: the family is unknown, a field is missing, or a field that changes the maths has a value that is not
      supported; field and value are named.
  """
  kind = str(fields.get("model_type"))
  exported = kind.startswith("tsparse_")  # written by `export_format`
  kind = kind.removeprefix("tsparse_")
  if kind not in FAMILIES:
    raise UserError(f"config.json: model_type {kind!r} is not supported; choose one of {', '.join(FAMILIES)}.")
  family = FAMILIES[kind]
  names = FIELDS | family.fields
  values = {ours: fields.get(theirs, family.defaults.get(theirs)) for ours, theirs in names.items()}
  values["tie_embeddings"] = bool(values["tie_embeddings"])
  values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
  if values["head_dim"] is None and values["d_model"] and values["num_heads"]:
    values["head_dim"] = values["d_model"] // values["num_heads"]
  for ours in NULL_IS_ZERO & values.keys():
    values[ours] = values[ours] or 0
  missing = [names[ours] for ours, value in values.items() if value is None]
  if missing:
    raise UserError(f"config.json lacks {', '.join(missing)}: the checkpoint is not whole.")

  kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
  for ours, value in values.items():
    if not isinstance(value, (int, float) if kinds[ours] is float else kinds[ours]):
      raise UserError(f"config.json: {names[ours]} = {value!r} is not of type {kinds[ours].__name__}.")
    values[ours] = kinds[ours](value)  # 50 as 50.0, which transformers asks for when it reads what we export
  only = ONLY | dict(family.only)
  activations = {family.hidden_act, "hidden_act", "hidden_act_param", "ffn_activation"}
  known = {*names.values(), *NO_MATHS, *family.no_maths, *only, *activations}
  for name, value in fields.items():
    if name not in known or value not in only.get(name, (value,)):
      allowed = f"only {only[name][0]!r} is" if name in only else "it is not known here and may change the maths"
      raise UserError(f"config.json: {name} = {value!r} is not supported ({allowed}).")
  activation = fields["ffn_activation"] if exported else activation_of(fields, family)
  values |= family.constants
  rope = read_rope(fields, family.defaults.get("rope_theta", 10_000.0))
  config = ModelConfig(**values, **rope, activation=activation, dtype="float32")
  check_layer_types(fields.get("layer_types"), config)
  return (exported_rules if exported else rules_of)(family, config), config


def check_layer_types(layer_types: Any, config: ModelConfig):
  """Raises UserError when `layer_types` of a config.json says other layers have a window than ours do."""
  expected = ["sliding_attention" if window else "full_attention" for window in config.windows]
  if layer_types not in (None, expected):
    raise UserError(f"config.json: layer_types = {layer_types} is not supported (only {expected} is).")


def activation_of(fields: Mapping[str, Any], family: Family) -> str:
  """Our name of a config.json's hidden_act."""
  name = fields.get(family.hidden_act, family.defaults.get(family.hidden_act, "silu"))
  if name == "fatrelu" and "relu" in family.activations:
    return f"fatrelu:{fields.get('hidden_act_param')}"
  if name not in family.activations:
    raise UserError(
      f"config.json: {family.hidden_act} {name!r} is not supported, only {', '.join(family.activations)} are."
    )
  return family.activations[name]


MODELING = Path(__file__).with_name("modeling_tsparse.py")
FFN_PATHS = {rule.ours for rule in EXPERTS}
# Fields of ours, beyond FIELDS, that any exported config.json carries, or that say nothing of the architecture.
EXPORTED = {"activation", "dtype", "remat", "rope_theta", "rope_scaling"}


def family_of(config: ModelConfig) -> str:
  """The `model_type` whose stock class has the architecture of `config`; UserError when there is none."""
  kind = {
    # (experts, qk_norm, attention_bias, window)
    (False, False, False, False): "llama",
    (False, False, False, True): "mistral",
    (False, False, True, False): "qwen2",
    (True, True, False, False): "olmoe",
    (True, False, False, False): "mixtral",
    (True, False, False, True): "mixtral",
  }.get((config.num_experts > 0, config.qk_norm, config.attention_bias, config.sliding_window > 0))
  if config.post_norms:
    kind = "gemma2"
  if kind is None or (kind == "mixtral" and not config.router_renormalize):
    raise UserError("no model class of transformers has this combination of experts, norms, biases and window.")
  family = FAMILIES[kind]
  carried = {*FIELDS, *family.fields, *EXPORTED}
  wrong = [
    f"{field.name} = {getattr(config, field.name)!r}"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in carried and getattr(config, field.name) != family.constants.get(field.name, field.default)
  ]
  if wrong:
    raise UserError(
      f"no model class of transformers is like this: {kind} is nearest and cannot have {', '.join(wrong)}."
    )
  return kind


def export_format(config: ModelConfig, dtype: str) -> tuple[dict[str, Any], tuple[Rule, ...], dict[str, str]]:
  """How a model is written for transformers: the fields of config.json, the rules, and the Python files it needs.

  Models whose activation is some `hidden_act` become the stock Llama, Mistral or Mixtral; the others a subclass in
  `modeling_tsparse.py`, which transformers loads by `trust_remote_code=True`.
  """
  kind = family_of(config)
  family = FAMILIES[kind]
  names = FIELDS | dict(family.fields)
  fields = {theirs: getattr(config, ours) for ours, theirs in names.items()}
  fields |= {names[ours]: getattr(config, ours) or None for ours in NULL_IS_ZERO & names.keys()}
  if "query_scalar" in names:
    fields[names["query_scalar"]] = config.query_scalar or config.head_dim
  fields |= {**write_rope(config), "torch_dtype": dtype}
  stock = {ours: theirs for theirs, ours in family.activations.items()}.get(config.activation)
  if stock:
    head = {"architectures": [family.architecture], "model_type": kind, family.hidden_act: stock}
    return head | fields, rules_of(family, config), {}
  module, name = MODELING.stem, f"Tsparse{kind.capitalize()}"
  head = {
    "architectures": [f"{name}ForCausalLM"],
    "auto_map": {"AutoConfig": f"{module}.{name}Config", "AutoModelForCausalLM": f"{module}.{name}ForCausalLM"},
    "model_type": f"tsparse_{kind}",
    "ffn_activation": config.activation,
  }
  return head | fields, exported_rules(family, config), {MODELING.name: MODELING.read_text()}


def exported_rules(family: Family, config: ModelConfig) -> tuple[Rule, ...]:
  """The rules of a model written beside MODELING."""
  if not config.num_experts:
    return rules_of(family, config)
  return (*(rule for rule in rules_of(family, config) if rule.ours not in FFN_PATHS), *PLAIN_EXPERTS)
