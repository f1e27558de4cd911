"""What a model is: a frozen dataclass, the presets, and the accounting of its parameters.

Axis letters used everywhere (einsum strings, logical axis names, shape comments):
B batch · T time · D model · F ffn · H head_dim · N query heads · K kv heads · V vocab · E experts · L layers ·
R rank of a predictor · S token-choice slots (B T top_k, sorted by expert).
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from tsparse.activations import activation
from tsparse.errors import UserError
from tsparse.models.attention import IMPLEMENTATIONS as ATTENTION
from tsparse.models.moe import IMPLEMENTATIONS
from tsparse.models.rope import parse_scaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder of the Llama family: Llama, Mistral, Mixtral, Qwen2, OLMoE, Gemma 2.

  Raises:
    UserError: from `__post_init__`, when a value is out of range or two values contradict each other.
  """

  vocab_size: int  # V; may exceed the tokenizer's size (padding rows)
  num_layers: int  # L
  d_model: int  # D
  d_ff: int  # F, neurons of one FFN (of one expert when there are experts)
  num_heads: int  # N
  num_kv_heads: int  # K; fewer than N is grouped-query attention
  head_dim: int  # H
  max_seq_len: int  # longest sequence the model is meant for
  num_experts: int = 0  # E; 0 is a dense FFN
  experts_per_token: int = 0  # experts each token is routed to
  num_shared_experts: int = 0  # experts that every token meets beside those it is routed to, computed as one
  shared_d_ff: int = 0  # neurons of each of those
  shared_gate: bool = False  # their output is weighted by a sigmoid of the token (Qwen-MoE)
  dense_layers: int = 0  # so many first layers have a dense FFN although the others have experts (DeepSeek-MoE)
  dense_d_ff: int = 0  # neurons of those
  predictor_ranks: tuple[int, ...] = ()  # R of each layer's neuron predictor (TurboSparse); empty is none
  predictor_input: str = ""  # what they read: before_norm (the residual stream) or after_norm (as the FFN)
  predictor_thresholds: bool = False  # each layer (and expert) has a threshold of its own (sparse/predictors), else 0
  hidden_thresholds: bool = False  # each layer zeroes what is below a threshold of its own (models/threshold.py)
  sliding_window: int = 0  # a token sees itself and the window - 1 before it; 0 sees everything before
  full_attention_every: int = 0  # the last of every so many layers has no window (Gemma 2: 2); 0 means all have it
  rope_theta: float = 10_000.0
  rope_scaling: str = ""  # of rotary positions, for longer texts: "" or as in models/rope.py, "linear:factor=4"
  norm_eps: float = 1e-5
  tie_embeddings: bool = False  # output head = transposed embedding
  attention_bias: bool = False  # on queries, keys and values (Qwen2)
  qk_norm: bool = False  # RMSNorm of the queries and of the keys, over all heads together (OLMoE)
  attention_softcap: float = 0.0  # attention scores become cap tanh(scores / cap) (Gemma 2); 0 means they stay
  final_softcap: float = 0.0  # and so do the logits
  query_scalar: int = 0  # attention scores are divided by its square root; 0 means head_dim
  norm_offset: float = 0.0  # a norm multiplies by offset + parameter (Gemma: 1), if not 0 before the cast to dtype
  post_norms: bool = False  # the outputs of attention and of the FFN are normed before they are added (Gemma 2)
  scale_embeddings: bool = False  # embeddings times sqrt(D), which is rounded to dtype (Gemma)
  router_renormalize: bool = True  # weights of the chosen experts sum to 1 (Mixtral); if not, softmax over all (OLMoE)
  moe_impl: str = "ragged"  # how experts are computed: a key of moe.IMPLEMENTATIONS, over the same parameters
  attention_impl: str = "auto"  # or triton: a kernel for GPUs that was never measured (models/attention.py)
  dtype: str = "bfloat16"  # compute; parameters are float32
  remat: str = "none"  # what is recomputed in the backward pass: a key of transformer.REMAT
  activation: str = "swiglu"  # a name of tsparse.activations

  def __post_init__(self):
    def require(holds: bool, sentence: str):
      if not holds:
        raise UserError(f"config.model: {sentence}.")

    activation(self.activation)
    object.__setattr__(self, "predictor_ranks", tuple(self.predictor_ranks))  # a list, from JSON
    for name in ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "max_seq_len"):
      require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, it must be positive")
    require(0 < self.rope_theta < float("inf"), f"rope_theta is {self.rope_theta}, it must be positive")
    if self.rope_scaling:
      parse_scaling(self.rope_scaling)
      require(self.rope_theta > 1, f"rope_theta is {self.rope_theta}, rope_scaling needs it above 1")
    require(0 < self.norm_eps < 1, f"norm_eps is {self.norm_eps}, it must be a small positive number")
    heads, kv_heads = self.num_heads, self.num_kv_heads
    require(heads % kv_heads == 0, f"num_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
    require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, rotary embeddings need pairs")
    require(self.sliding_window >= 0, f"sliding_window is {self.sliding_window}; 0 means none")
    every = self.full_attention_every
    require(every == 0 or every > 1, f"full_attention_every is {every}; it must be above 1, or 0 for none")
    require(every == 0 or self.sliding_window > 0, f"full_attention_every is {every} and there is no sliding_window")
    for name in ("attention_softcap", "final_softcap", "query_scalar"):
      require(0 <= getattr(self, name) < float("inf"), f"{name} is {getattr(self, name)}; 0 means none")
    require(abs(self.norm_offset) < float("inf"), f"norm_offset is {self.norm_offset}, it must be finite")
    require(self.num_experts >= 0, f"num_experts is {self.num_experts}; 0 means a dense FFN")
    experts, chosen = self.num_experts, self.experts_per_token
    fits = 1 <= chosen <= experts if experts else chosen == 0
    require(fits, f"experts_per_token {chosen} does not fit num_experts {experts}")
    known = ", ".join(IMPLEMENTATIONS)
    require(self.moe_impl in IMPLEMENTATIONS, f"moe_impl {self.moe_impl!r} is unknown, choose one of {known}")
    ways = ", ".join(ATTENTION)
    require(
      self.attention_impl in ATTENTION, f"attention_impl {self.attention_impl!r} is unknown, choose one of {ways}"
    )
    shared, first, ranks = self.num_shared_experts, self.dense_layers, self.predictor_ranks
    require(shared >= 0 and (experts or not shared), f"num_shared_experts is {shared} and the model has no experts")
    require(not shared or self.shared_d_ff > 0, f"shared_d_ff is {self.shared_d_ff}, it must be positive")
    require(shared or not self.shared_gate, "shared_gate is set and there is no shared expert")
    require(0 <= first < self.num_layers, f"dense_layers is {first} of {self.num_layers} layers")
    require(experts or not first, f"dense_layers is {first} and the model has no experts: all its layers are dense")
    require(not first or self.dense_d_ff > 0, f"dense_d_ff is {self.dense_d_ff}, it must be positive")
    fits = len(ranks) == self.num_layers and min(ranks) > 0 and not (first or shared) if ranks else True
    require(fits, f"predictor_ranks {ranks} are not one positive rank for each of {self.num_layers} equal layers")
    inputs = ("before_norm", "after_norm") if ranks else ("",)
    require(self.predictor_input in inputs, f"predictor_input is {self.predictor_input!r}, not one of {inputs}")
    require(ranks or not self.predictor_thresholds, "predictor_thresholds is set and there are no predictors")
    require(self.dtype in ("float32", "bfloat16"), f"dtype {self.dtype!r} is unknown, choose float32 or bfloat16")

  @property
  def sizes(self) -> dict[str, int]:
    """Axis letter -> length, for the axes of the parameters."""
    return {
      "D": self.d_model,
      "F": self.d_ff,
      "H": self.head_dim,
      "N": self.num_heads,
      "K": self.num_kv_heads,
      "V": self.vocab_size,
      "E": self.num_experts,
      "R": max(self.predictor_ranks, default=0),
    }

  @property
  def windows(self) -> tuple[int, ...]:
    """The sliding window of each layer, 0 where there is none."""
    every = self.full_attention_every
    return tuple(0 if every and (i + 1) % every == 0 else self.sliding_window for i in range(self.num_layers))

  @property
  def first(self) -> "ModelConfig":
    """The model whose layers are the dense ones before those with experts."""
    return self._dense(self.dense_d_ff)

  @property
  def shared(self) -> "ModelConfig":
    """The model whose FFN is the shared experts'."""
    return self._dense(self.num_shared_experts * self.shared_d_ff)

  def _dense(self, d_ff: int) -> "ModelConfig":
    moe = {field.name: field.default for field in dataclasses.fields(self) if field.name in MOE_FIELDS}
    return dataclasses.replace(self, d_ff=d_ff, **moe)


MOE_FIELDS = (
  "num_experts", "experts_per_token", "num_shared_experts", "shared_d_ff", "shared_gate", "dense_layers", "dense_d_ff",
)  # fmt: skip


def model_config(config: Any) -> ModelConfig:
  """The model of an experiment's config: `config.model`, with `config.activation`."""
  return ModelConfig(**config.model, activation=config.activation)


# One tiny model serves the demo, the tests and the notebooks. V = the 259 ids of the byte vocabulary, rounded up.
TINY = ModelConfig(
  vocab_size=264,
  num_layers=4,
  d_model=128,
  d_ff=512,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_seq_len=512,
  dtype="float32",  # bfloat16 matrix products are slow on CPU
  remat="full",  # and so is memory: recomputing a layer takes 0.75 of the time of storing and reading it
)
MISTRAL_7B = ModelConfig(
  vocab_size=32_000,
  num_layers=32,
  d_model=4096,
  d_ff=14_336,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  max_seq_len=32_768,
  sliding_window=4096,
  remat="full",
)
PRESETS = {
  "tiny": TINY,
  "tiny_moe": dataclasses.replace(TINY, d_ff=256, num_experts=4, experts_per_token=2),
  # karpathy/tinyllamas, a real pretrained SwiGLU Llama on TinyStories
  "stories260k": dataclasses.replace(
    TINY,
    vocab_size=512,
    num_layers=5,
    d_model=64,
    d_ff=172,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    tie_embeddings=True,
  ),
  # Turbo Sparse, appendix A.1, Table 11. d_ff is not printed there; 8/3 D rounded to 64 gives the "300M" (docs/paper).
  "300m": ModelConfig(
    vocab_size=32_000,
    num_layers=24,
    d_model=1024,
    d_ff=2752,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    max_seq_len=2048,
    remat="full",
  ),
  "llama2_7b": dataclasses.replace(
    MISTRAL_7B, d_ff=11_008, num_kv_heads=32, max_seq_len=4096, sliding_window=0
  ),
  "mistral_7b": MISTRAL_7B,
  "mixtral_8x7b": dataclasses.replace(
    MISTRAL_7B, num_experts=8, experts_per_token=2, sliding_window=0, rope_theta=1e6
  ),
}  # fmt: skip


def parameter_counts(config: ModelConfig) -> dict[str, int]:
  """Number of parameters by component, from the architecture alone.

  Components: embedding, head, attention, norms, router (with the gate of a shared expert), predictor, threshold, and
  the FFNs of FFNS: ffn, shared, first.
  """
  s = config.sizes
  layers, experts = config.num_layers, max(1, config.num_experts)
  return {
    "embedding": s["V"] * s["D"],
    "head": 0 if config.tie_embeddings else s["V"] * s["D"],
    "attention": layers * s["H"] * (2 * s["D"] * (s["N"] + s["K"]) + config.attention_bias * (s["N"] + 2 * s["K"])),
    "norms": ((2 + 2 * config.post_norms) * layers + 1) * s["D"] + config.qk_norm * layers * s["H"] * (s["N"] + s["K"]),
    "router": (layers - config.dense_layers) * s["D"] * (s["E"] + config.shared_gate),
    "predictor": (sum(config.predictor_ranks) * (s["D"] + s["F"]) + layers * config.predictor_thresholds) * experts,
    "threshold": config.hidden_thresholds * (layers + (layers - config.dense_layers) * bool(config.num_shared_experts)),
    "ffn": (layers - config.dense_layers) * experts * 3 * s["D"] * s["F"],
    "shared": (layers - config.dense_layers) * 3 * s["D"] * config.num_shared_experts * config.shared_d_ff,
    "first": config.dense_layers * 3 * s["D"] * config.dense_d_ff,
  }


FFNS = ("ffn", "shared", "first")  # the kinds of FFN of a model, as in models/counts.py


def ffn_layers(config: ModelConfig) -> dict[str, int]:
  """Number of layers of each kind of FFN that the model has, in the order of FFNS."""
  rest = config.num_layers - config.dense_layers
  lengths = {"ffn": rest, "shared": rest if config.num_shared_experts else 0, "first": config.dense_layers}
  return {kind: length for kind, length in lengths.items() if length}


ACTIVATED_DEFINITION = (
  "parameters read for one token: every weight outside the FFN (embedding and head counted whole), plus, in each FFN "
  "(in each of the experts a token is routed to, and in a shared one), the gate, up and down weights of the neurons "
  "whose hidden entry is not exactly zero; mean over all real tokens. Neuron predictors are counted whole where "
  "the model holds them (of the routed experts); where it holds none, finding the zeros is not free and not counted"
)


def activated_parameters(
  config: ModelConfig, zero_fractions: Mapping[str, float], without: Collection[str] = ()
) -> float:
  """Parameters read per token. See ACTIVATED_DEFINITION.

  activated = sum over components of their parameters * share of them that is read: 1 outside the FFNs,
  1 - zero_fraction in an FFN, and in routed experts and their predictors that times experts_per_token / E. Turbo Sparse
  (arXiv 2406.05955) prints such figures without a formula.

  Args:
    config: the model.
    zero_fractions: share of the hidden that is exactly zero, by kind of FFN (keys of FFNS that the model has).
    without: components that are not counted.
  """
  counts = parameter_counts(config)
  routed = config.experts_per_token / config.num_experts if config.num_experts else 1.0
  share = {name: 1.0 - zeros for name, zeros in zero_fractions.items()}
  share["ffn"] *= routed
  share["predictor"] = routed
  return sum(count * share.get(name, 1.0) for name, count in counts.items() if name not in without)
