"""Families of Hugging Face checkpoints: their tensors (rules) and the fields of their config.json."""

import dataclasses
import re
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
# Fields that do not change the forward pass. `pretraining_tp` cuts products of matrices into sums that are equal.
NO_MATHS = {
  "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "attention_dropout",
  "attn_implementation", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range",
  "is_decoder", "label2id", "max_length", "max_sequence_length", "model_type", "output_attentions",
  "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
  "rope_parameters", "rope_scaling", "rope_theta", "router_aux_loss_coef", "tf_legacy_loss", "tokenizer_class",
  "torch_dtype", "torchscript", "transformers_version", "tsparse_bos", "tsparse_eos", "tsparse_vocabulary",
  "unk_token_id", "use_bfloat16", "use_cache",
}  # fmt: skip
# Fields that would, by the only values that are supported.
ONLY = {
  "attention_bias": (False, None), "chunk_size_feed_forward": (0,), "is_encoder_decoder": (False,),
  "mlp_bias": (False, None), "pruned_heads": ({}, None), "quantization_config": (None,), "rope_interleaved": (False,),
  "router_jitter_noise": (0.0, None), "use_mrope": (False,),
}  # fmt: skip
SHARED = tuple(
  Rule(f"layers/ffn/shared/{ours}", LAYER + f"mlp.shared_expert.{ours}_proj.weight", pattern)
  for ours, pattern in (("gate", "F D -> D F"), ("up", "F D -> D F"), ("down", "D F -> F D"))
)
SHARED_GATE = Rule("layers/ffn/shared_gate", LAYER + "mlp.shared_expert_gate.weight", "1 D -> D")
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
    architecture: the class of transformers; "" when it has none.
    rules: its tensors but for those that `rules_of` adds.
    fields: our field -> theirs, beyond FIELDS.
    defaults: values of their fields where config.json leaves them out.
    activations: hidden_act -> our activation.
    hidden_act: their field that says the activation.
    constants: our fields that are so in all its models.
    only: their fields that change the maths, by the only values supported.
    no_maths: their fields that do not, given `only`.
    predictor_input: what the neuron predictors read, if its models hold such.
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
  predictor_input: str = ""


# The same experts by the names of a dense FFN: OLMoE's, and those of what we export beside MODELING.
PLAIN_EXPERTS = tuple(
  rule._replace(theirs=rule.theirs.replace("block_sparse_moe", "mlp").replace(short, long))
  for rule, (short, long) in zip(
    EXPERTS, [("", ""), ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")], strict=True
  )
)
PREDICTORS = (
  Rule("layers/ffn/predictor/fc1", LAYER + "mlp.predictor.fc1.weight", "R D -> D R"),
  Rule("layers/ffn/predictor/fc2", LAYER + "mlp.predictor.fc2.weight", "F R -> R F"),
)
THRESHOLD = Rule("layers/ffn/threshold", LAYER + "mlp.threshold", "1 -> ")


def within(rules: tuple[Rule, ...], before: str, after: str) -> tuple[Rule, ...]:
  """The same rules, `before` replaced by `after` in the names of theirs."""
  return tuple(rule._replace(theirs=rule.theirs.replace(before, after)) for rule in rules)


WINDOW = {"sliding_window": "sliding_window"}
MIXTRAL = WINDOW | {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
EXPERT_FIELDS = {"experts_per_token": "num_experts_per_tok", "router_renormalize": "norm_topk_prob"}
# Fields of ours whose 0 is null in config.json.
NULL_IS_ZERO = {"sliding_window", "attention_softcap", "final_softcap", "num_shared_experts"}
FAMILIES = {
  # ReluLLaMA is a llama with hidden_act relu; ProSparse adds fatrelu with its threshold in hidden_act_param.
  "llama": Family("LlamaForCausalLM", ATTENTION + FFN, {}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
                  only={"sliding_window": (None,)}),
  "mistral": Family("MistralForCausalLM", ATTENTION + FFN, WINDOW, {"rms_norm_eps": 1e-6, "sliding_window": 4096}),
  "mixtral": Family(
    "MixtralForCausalLM",
    ATTENTION + EXPERTS,
    MIXTRAL,
    {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    ATTENTION + FFN,
    {},
    {"rms_norm_eps": 1e-6},
    constants={"attention_bias": True},
    only={"use_sliding_window": (False,)},
    no_maths=("sliding_window", "max_window_layers", "layer_types"),
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    ATTENTION + QK_NORM + PLAIN_EXPERTS,
    EXPERT_FIELDS | {"num_experts": "num_experts"},
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
  "qwen2_moe": Family(
    "Qwen2MoeForCausalLM",
    ATTENTION + PLAIN_EXPERTS + SHARED + (SHARED_GATE,),
    EXPERT_FIELDS
    | {"num_experts": "num_experts", "d_ff": "moe_intermediate_size", "shared_d_ff": "shared_expert_intermediate_size"}
    | {"attention_bias": "qkv_bias"},
    {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "qkv_bias": True},
    constants={"num_shared_experts": 1, "shared_gate": True},
    only={"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    no_maths=("sliding_window", "max_window_layers", "layer_types", "intermediate_size"),
  ),
  # DeepSeek-MoE (v1), whose code lives beside its weights.
  "deepseek": Family(
    "",
    ATTENTION + PLAIN_EXPERTS + within(SHARED, "shared_expert", "shared_experts"),
    EXPERT_FIELDS
    | {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    | {"d_ff": "moe_intermediate_size", "shared_d_ff": "moe_intermediate_size"}
    | {"dense_d_ff": "intermediate_size", "dense_layers": "first_k_dense_replace"},
    {"rms_norm_eps": 1e-6, "norm_topk_prob": False, "first_k_dense_replace": 0},
    only={"moe_layer_freq": (1,), "scoring_func": ("softmax",)},
    no_maths=("aux_loss_alpha", "seq_aux", "ep_size"),
  ),
  # Bamboo and its successor TurboSparse-Mistral, which holds predictors: hidden_act relu means dReLU there.
  "bamboo": Family(
    "",
    ATTENTION + FFN,
    WINDOW,
    {"rms_norm_eps": 1e-6},
    activations={"relu": "drelu"},
    predictor_input="before_norm",
  ),
  "turbosparsemixtral": Family(
    "",
    ATTENTION + EXPERTS,
    MIXTRAL,
    {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
    activations={"relu": "drelu"},
    predictor_input="after_norm",
  ),
}  # fmt: skip


def rules_of(family: Family, config: ModelConfig) -> tuple[Rule, ...]:
  """All rules of a model of the family."""
  rules = family.rules
  if not config.tie_embeddings:
    rules += (HEAD,)
  if config.attention_bias:
    rules += BIAS
  if config.predictor_ranks:
    rules += expert_predictors(rules) if config.num_experts else PREDICTORS
  thresholds = (THRESHOLD,) if config.hidden_thresholds else ()
  rules += thresholds
  for shared in [rule for rule in rules if thresholds and rule.ours == "layers/ffn/shared/gate"]:
    theirs = shared.theirs.replace("gate_proj.weight", "threshold")
    rules += (THRESHOLD._replace(ours="layers/ffn/shared/threshold", theirs=theirs),)
  if config.dense_layers:
    dense = [rule for rule in rules if re.match("layers/(?!ffn/)", rule.ours)] + [*FFN, *thresholds]
    rules += tuple(rule._replace(ours=rule.ours.replace("layers/", "first/")) for rule in dense)
  return rules


def expert_predictors(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
  """PREDICTORS inside the experts that `rules` name."""
  gate = next(rule.theirs for rule in rules if rule.ours == "layers/ffn/gate")
  return within(PREDICTORS, LAYER + "mlp.", gate[: gate.index("{expert}")] + "{expert}.")


def read_config(
  fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[Rule, ...], ModelConfig]:
  """The rules and the model of a checkpoint.

  Args:
    fields: of config.json.
    shapes: name of every tensor -> its shape; the widths of predictors stand nowhere else.

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
  known = {*names.values(), *NO_MATHS, *family.no_maths, *only, family.hidden_act, "hidden_act", "hidden_act_param"}
  known |= {"ffn_activation", "hidden_thresholds", "predictor_input", "predictor_ranks"} if exported else set()
  for name, value in fields.items():
    if name not in known or value not in only.get(name, (value,)):
      allowed = f"only {only[name][0]!r} is" if name in only else "it is not known here and may change the maths"
      raise UserError(f"config.json: {name} = {value!r} is not supported ({allowed}).")
  act = str(fields.get("ffn_activation")) if exported else activation_of(fields, family)
  rope = read_rope(fields, family.defaults.get("rope_theta", 10_000.0))
  config = ModelConfig(**values, **family.constants, **rope, activation=act, dtype="float32")
  config = dataclasses.replace(config, hidden_thresholds=exported and bool(fields.get("hidden_thresholds")))
  check_layer_types(fields.get("layer_types"), config)
  predictor_input = fields.get("predictor_input", "") if exported else family.predictor_input
  config = with_predictors(config, predictor_input, shapes)
  return (exported_rules if exported else rules_of)(family, config), config


def with_predictors(config: ModelConfig, predictor_input: str, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
  """`config` with the predictors whose tensors are in `shapes`, if there are any."""
  ranks = []
  for layer in range(config.num_layers) if predictor_input else ():
    pattern = rf"model\.layers\.{layer}\..*predictor\.fc1\.weight"
    ranks += sorted({shape[0] for name, shape in shapes.items() if re.fullmatch(pattern, name)})
  if not ranks:  # Bamboo itself holds none
    return config
  if len(ranks) != config.num_layers:
    raise UserError("the checkpoint's predictors (predictor.fc1.weight) are not of one rank in each layer.")
  return dataclasses.replace(config, predictor_ranks=tuple(ranks), predictor_input=predictor_input)


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
# Fields of ours that every exported config.json carries, or that say nothing of the architecture.
FREE = {
  *FIELDS, "rope_theta", "rope_scaling", "activation", "dtype", "remat", "moe_impl", "predictor_ranks",
  "predictor_input", "hidden_thresholds", "attention_impl",
}  # fmt: skip


def family_of(config: ModelConfig) -> str:
  """The first `model_type` that can express the architecture of `config`; UserError when there is none."""
  wrong = {kind: inexpressible(family, config) for kind, family in FAMILIES.items()}
  kind = min(wrong, key=lambda kind: len(wrong[kind]))
  if wrong[kind]:
    raise UserError(
      f"no model class of transformers is like this: {kind} is nearest and cannot have {', '.join(wrong[kind])}."
    )
  return kind


def inexpressible(family: Family, config: ModelConfig) -> list[str]:
  """The fields of `config`, with their values, that no config.json of the family can say."""
  values = dataclasses.asdict(config)
  defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name not in FREE}
  fixed = {name: value for name, value in (defaults | dict(family.constants)).items() if name not in family.fields}
  wrong = {name for name, value in fixed.items() if values[name] != value}
  for theirs in family.fields.values():  # some say two of ours, which must then be equal
    said = [name for name, other in family.fields.items() if other == theirs]
    wrong |= set(said) if len({values[name] for name in said}) > 1 else set()
  if "num_experts" in family.fields and not config.num_experts:
    wrong.add("num_experts")
  return [f"{name} = {value!r}" for name, value in values.items() if name in wrong]


def export_format(config: ModelConfig, dtype: str) -> tuple[dict[str, Any], tuple[Rule, ...], dict[str, str]]:
  """How a model is written for transformers: the fields of config.json, the rules, and the Python files it needs.

  Models whose activation is some `hidden_act` of a class in transformers become that; the others a subclass in
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
  if stock and family.architecture and not (config.predictor_ranks or config.hidden_thresholds):
    head = {"architectures": [family.architecture], "model_type": kind, family.hidden_act: stock}
    return head | fields, rules_of(family, config), {}
  module, name = MODELING.stem, "Tsparse" + kind.replace("_", " ").title().replace(" ", "")
  head = {
    "architectures": [f"{name}ForCausalLM"],
    "auto_map": {"AutoConfig": f"{module}.{name}Config", "AutoModelForCausalLM": f"{module}.{name}ForCausalLM"},
    "model_type": f"tsparse_{kind}",
    "ffn_activation": config.activation,
  }
  if config.predictor_ranks:
    head |= {"predictor_ranks": list(config.predictor_ranks), "predictor_input": config.predictor_input}
  if config.hidden_thresholds:
    head["hidden_thresholds"] = True
  return head | fields, exported_rules(family, config), {MODELING.name: MODELING.read_text()}


def exported_rules(family: Family, config: ModelConfig) -> tuple[Rule, ...]:
  """The rules of a model written beside MODELING: those of the family, all routed experts by the same names."""
  if not config.num_experts:
    return rules_of(family, config)
  plain = {rule.ours: rule for rule in (*PLAIN_EXPERTS, *expert_predictors(PLAIN_EXPERTS))}
  return tuple(plain.get(rule.ours, rule) for rule in rules_of(family, config))
