"""Checkpoints of Hugging Face, in and out: logits equal those of transformers, and a round trip changes no bit."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from configs import stories_relufy
from tsparse import experiment
from tsparse.convert.convert import _cast, convert
from tsparse.convert.families import export_format, read_config
from tsparse.convert.huggingface import _tensors, copy_tokenizer, write_directory
from tsparse.convert.leaf import Leaf
from tsparse.convert.model import open_model
from tsparse.convert.rules import to_theirs
from tsparse.data import first_token, load_tokenizer
from tsparse.errors import UserError
from tsparse.models.config import PRESETS, ModelConfig
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.sharding import MESH_AXES, make_mesh, shardings
from tsparse.sparse.layout import arrange
from tsparse.train.checkpoint import abstract

SIZES = {
  "vocab_size": 97,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "initializer_range": 0.2,  # far from a trivial softmax
}
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}  # 40 tokens go beyond the original
CASES = {
  "llama": ("Llama", {}),
  "llama_tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 500.0}),
  "llama_head_dim": ("Llama", {"head_dim": 16, "rms_norm_eps": 1e-3}),
  "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}}),
  "llama_3.1": (
    "Llama",
    {"rope_parameters": ROPE | {"rope_type": "llama3", "low_freq_factor": 0.5, "high_freq_factor": 2.0}},
  ),
  "llama_yarn": ("Llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
  "llama_yarn_numbers": (
    "Llama",
    {
      "rope_parameters": ROPE
      | {
        "rope_type": "yarn",
        "beta_fast": 3.0,
        "beta_slow": 0.5,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
      }
    },
  ),
  "relullama": ("Llama", {"hidden_act": "relu"}),
  "mistral": ("Mistral", {"sliding_window": 7}),
  "mistral_full": ("Mistral", {"sliding_window": None}),
  "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
  "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
  "olmoe_renormalized": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}),
  "gemma2": (
    "Gemma2",
    {
      "num_hidden_layers": 3,
      "head_dim": 16,
      "sliding_window": 7,
      "query_pre_attn_scalar": 10,
      "attn_logit_softcapping": 1.5,
      "final_logit_softcapping": 2.0,
    },
  ),
  "gemma2_uncapped": (
    "Gemma2",
    {
      "head_dim": 16,
      "sliding_window": 3,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "tie_word_embeddings": False,
      "rope_parameters": ROPE | {"rope_type": "yarn"},
    },
  ),
  "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
  "qwen2_moe": (
    "Qwen2Moe",
    {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
  ),
}


def save_huggingface(folder: Path, family: str, fields: dict, dtype="float32"):
  """Writes a random model by transformers and returns it."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = getattr(transformers, f"{family}Config")(**SIZES | fields, attn_implementation="eager")
  model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  for parameter in model.parameters():
    if parameter.ndim == 1:  # norms and biases, all ones and zeros so far
      parameter.data += 0.2 * torch.randn_like(parameter)
  model.to(getattr(torch, dtype))
  model.save_pretrained(folder)
  return model


@pytest.mark.parametrize(
  "kind", ["json", "json_without_bos", "json_that_ends", "GPTNeoXTokenizerFast", "sentencepiece"]
)
def test_an_exported_folder_has_bos_in_transformers_where_the_model_has_it(kind, tmp_path, request):
  import tokenizers as tk
  from transformers import AutoTokenizer

  source, names = tmp_path / "source", {"bos_token": "<s>", "eos_token": "</s>"}
  save_huggingface(source, "Llama", {"vocab_size": 512})
  config = json.loads((source / "config.json").read_text())
  if kind == "sentencepiece":
    shutil.copy(request.getfixturevalue("shared_data") / "stories260k" / "tokenizer.model", source)
  else:
    names = {"eos_token": "</s>"} if kind == "json_without_bos" else names
    made = tk.Tokenizer(tk.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "cat": 4}, "<unk>"))
    made.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", *names.values()])
    if kind == "json_that_ends":
      made.post_processor = tk.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made.save(str(source / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast" if kind.startswith("json") else kind}
    (source / "tokenizer_config.json").write_text(json.dumps(names | kinds))
  for bos in ("auto", "on", "off"):
    recorded = {} if bos == "auto" else {"tsparse_bos": bos}
    (source / "config.json").write_text(json.dumps(config | recorded))
    assert convert(source, tmp_path / f"ours_{bos}", "tsparse").bos == bos
    again = convert(tmp_path / f"ours_{bos}", tmp_path / bos, "hf")
    ours, theirs = load_tokenizer(again.vocabulary), AutoTokenizer.from_pretrained(tmp_path / bos)
    first = first_token(ours, again.bos)
    assert first == {"auto": first_token(load_tokenizer(str(source)), "auto"), "on": ours.bos, "off": None}[bos]
    assert again.bos == bos and first_token(ours, "auto") == first  # the files alone say so
    ids = theirs("a cat").input_ids
    ends = [2] if kind == "json_that_ends" else []
    assert ids == [*([] if first is None else [first]), *theirs("a cat", add_special_tokens=False).input_ids, *ends]


def test_generation_in_transformers_ends_where_a_lone_sentencepiece_model_does(shared_data, tmp_path):
  shutil.copy(shared_data / "stories260k" / "tokenizer.model", tmp_path / "pieces.model")
  (tmp_path / "out").mkdir()
  copy_tokenizer(str(tmp_path / "pieces.model"), tmp_path / "out")
  ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert ends == {"bos_token_id": 1, "eos_token_id": 2}


def parameters(model):
  mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
  shapes, logical = abstract_parameters(Transformer(model.config))
  return model.restore(abstract(shapes, shardings(mesh, logical)))[0]


@functools.cache
def forward(config):
  return jax.jit(Transformer(config).apply)


def our_logits(path, tokens, config: ModelConfig | None = None, segment_ids=None, positions=None):
  model = open_model(path)
  if positions is None:
    segment_ids = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return forward(config or model.config)({"params": parameters(model)}, tokens, segment_ids, positions)[0]


def their_logits(model, tokens):
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


def tensors(folder):
  from safetensors import safe_open

  found = {}
  for path in sorted(Path(folder).glob("*.safetensors")):
    with safe_open(path, framework="np") as file:
      found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  return found


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_and_the_round_trip_is_exact(case, tmp_path):
  theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
  reference = save_huggingface(theirs, *CASES[case])
  convert(theirs, ours, "tsparse")
  for length in (1, 40):  # 40 crosses the sliding window several times
    tokens = np.random.default_rng(length).integers(0, 97, (2, length))
    expected = their_logits(reference, tokens)
    for path in (theirs, ours):
      np.testing.assert_allclose(our_logits(path, tokens), expected, atol=1e-4, rtol=0)

  # two documents of each row packed into one, and padding behind them: each as transformers computes it alone
  segment_ids = np.repeat([[1, 2, 0]], (17, 18, 5), axis=1).repeat(2, axis=0)
  positions = np.concatenate([np.arange(17), np.arange(18), np.zeros(5, int)])[None].repeat(2, axis=0)
  packed = our_logits(ours, tokens, segment_ids=segment_ids, positions=positions)
  for document in (slice(0, 17), slice(17, 35)):
    alone = their_logits(reference, tokens[:, document])
    np.testing.assert_allclose(packed[:, document], alone, atol=1e-4, rtol=0)

  convert(ours, back, "hf")
  before, after = tensors(theirs), tensors(back)
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    np.testing.assert_array_equal(tensor, after[name])
  import transformers

  again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager")
  np.testing.assert_allclose(their_logits(again, tokens), expected, atol=1e-6)


@pytest.mark.parametrize("case", ["llama_3.1", "llama_yarn"])
def test_logits_stay_equal_far_beyond_the_original_length(case, tmp_path):
  family, fields = CASES[case]
  rope = fields["rope_parameters"] | {"rope_theta": 1e4, "original_max_position_embeddings": 128}
  reference = save_huggingface(tmp_path, family, {"rope_parameters": rope, "max_position_embeddings": 1024})
  tokens = np.random.default_rng(0).integers(0, 97, (1, 1000))
  np.testing.assert_allclose(our_logits(tmp_path, tokens), their_logits(reference, tokens), atol=1e-4, rtol=0)


def test_bfloat16_weights_survive_bit_for_bit(tmp_path):
  save_huggingface(tmp_path / "theirs", *CASES["mistral"], dtype="bfloat16")
  convert(tmp_path / "theirs", tmp_path / "ours", "tsparse")
  convert(tmp_path / "ours", tmp_path / "back", "hf", dtype="bfloat16")
  before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
  assert all(before[name].tobytes() == after[name].tobytes() for name in before) and before.keys() == after.keys()


@pytest.mark.parametrize(
  "case", ["llama_tied", "llama_yarn", "mistral", "qwen2", "gemma2", "mixtral", "olmoe", "qwen2_moe"]
)
@pytest.mark.parametrize("activation", ["drelu", "fatrelu:0.01"])
def test_an_exported_sparse_model_gives_our_logits_in_transformers(case, activation, tmp_path):
  import transformers

  save_huggingface(tmp_path / "theirs", *CASES[case])
  sparse = convert(tmp_path / "theirs", tmp_path / "sparse", "tsparse", activation=activation)
  assert sparse.config.activation == activation
  convert(tmp_path / "sparse", tmp_path / "out", "hf")
  assert json.loads((tmp_path / "out" / "config.json").read_text())["ffn_activation"] == activation
  exported = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", trust_remote_code=True, attn_implementation="eager"
  )
  tokens = np.random.default_rng(0).integers(0, 97, (2, 20))
  logits = our_logits(tmp_path / "sparse", tokens)
  np.testing.assert_allclose(their_logits(exported, tokens), logits, atol=1e-4, rtol=0)
  np.testing.assert_allclose(our_logits(tmp_path / "out", tokens), logits, atol=1e-6)  # and it comes back
  swiglu = dataclasses.replace(sparse.config, activation="swiglu")
  assert np.abs(our_logits(tmp_path / "sparse", tokens, swiglu) - logits).max() > 0.1


@pytest.mark.parametrize("case", ["llama_tied", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize(("activation", "thresholds"), [("swiglu", True), ("topk:0.8", False), ("qsparse:0.8", False)])
def test_an_exported_model_keeps_its_thresholds_and_what_compares_entries(case, activation, thresholds, tmp_path):
  import transformers

  save_huggingface(tmp_path / "theirs", *CASES[case])
  theirs = open_model(tmp_path / "theirs")
  config = dataclasses.replace(theirs.config, activation=activation, hidden_thresholds=thresholds)
  leaves, _ = theirs.leaves()
  if thresholds:
    paths = ["layers/ffn/threshold", *(["layers/ffn/shared/threshold"] if config.num_shared_experts else [])]
    values = np.array([0.02, 0.05, 0.03, 0.04][: config.num_layers], np.float32)
    leaves |= {path: Leaf(values.shape, values.dtype, 0, lambda _: values) for path in paths}
  fields, rules, files = export_format(config, "float32")
  (tmp_path / "out").mkdir()
  write_directory(tmp_path / "out", fields, to_theirs(rules, config, leaves), files)
  again = open_model(tmp_path / "out")
  assert (again.config.activation, again.config.hidden_thresholds) == (activation, thresholds)
  exported = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", trust_remote_code=True, attn_implementation="eager"
  )
  tokens = np.random.default_rng(0).integers(0, 97, (2, 20))
  logits = our_logits(tmp_path / "out", tokens)
  np.testing.assert_allclose(their_logits(exported, tokens), logits, atol=1e-4, rtol=0)
  assert np.abs(our_logits(tmp_path / "theirs", tokens) - logits).max() > 0.01


@pytest.mark.parametrize("format", ["hf", "tsparse"])
def test_thresholds_are_float32_in_every_export(format, tmp_path):
  """In bfloat16 0.0203 is 0.0203857; a model of ours, its export and what transformers makes of that have the same."""
  import torch
  import transformers

  save_huggingface(tmp_path / "theirs", *CASES["qwen2_moe"])
  model = open_model(tmp_path / "theirs")
  config = dataclasses.replace(model.config, activation="swiglu", hidden_thresholds=True)
  values = np.array([0.0203, 0.0501, 0.0307, 0.0411][: config.num_layers], np.float32)
  paths = "layers/ffn/threshold", "layers/ffn/shared/threshold"
  leaves = model.leaves()[0] | {path: Leaf(values.shape, values.dtype, 0, lambda _: values) for path in paths}
  (tmp_path / "made").mkdir()
  fields, mapping, modeling = export_format(config, "float32")
  write_directory(tmp_path / "made", fields, to_theirs(mapping, config, leaves), modeling)

  convert(tmp_path / "made", tmp_path / "out", format, dtype="bfloat16")
  again = open_model(tmp_path / "out").leaves()[0]
  for path in paths:
    assert again[path].dtype == np.float32
    np.testing.assert_array_equal(again[path].at(()), values)
  assert again["layers/ffn/gate"].dtype == "bfloat16"
  of_predictor = {"layers/ffn/predictor/threshold": again[paths[0]]}  # its logits are compared in float32 too
  assert _cast(of_predictor, "bfloat16")[[*of_predictor][0]].dtype == np.float32
  restored = parameters(open_model(tmp_path / "out"))["layers"]["ffn"]
  np.testing.assert_array_equal([restored["threshold"], restored["shared"]["threshold"]], [values] * 2)
  decoded = arrange(config, again, "bfloat16")["layers"]
  for name in ("hidden_threshold", "shared_hidden_threshold"):
    assert decoded[0]["out"].dtype == "bfloat16" and decoded[0][name].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([layer[name] for layer in decoded]), values)
  if format == "hf":
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype="auto")
    of_layers = [layer.mlp.threshold for layer in exported.model.layers]
    assert exported.dtype == torch.bfloat16 and {theta.dtype for theta in of_layers} == {torch.float32}
    np.testing.assert_array_equal(torch.cat(of_layers).detach().numpy(), values)
    exported(torch.zeros((1, 3), dtype=torch.long))


def test_an_upcycled_model_has_the_logits_of_the_dense_one(source, tmp_path):
  moe = convert(source, tmp_path / "moe", "tsparse", experts=4)
  assert (moe.config.num_experts, moe.config.experts_per_token) == (4, 2)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 20))
  np.testing.assert_allclose(our_logits(tmp_path / "moe", tokens), our_logits(source, tokens), atol=1e-5)
  convert(tmp_path / "moe", tmp_path / "mixtral", "hf")
  assert json.loads((tmp_path / "mixtral" / "config.json").read_text())["model_type"] == "mixtral"
  with pytest.raises(UserError, match="has 4 experts already"):
    convert(tmp_path / "moe", tmp_path / "again", "tsparse", experts=4)
  with pytest.raises(UserError, match="at least as many"):
    convert(source, tmp_path / "again", "tsparse", experts=1)
  assert not (tmp_path / "again").exists()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gemma")
  save_huggingface(folder, *CASES["gemma2"])
  return folder


@pytest.mark.parametrize(
  "change",
  [
    {"norm_offset": 0.0},
    {"post_norms": False},
    {"scale_embeddings": False},
    {"attention_softcap": 0.0},
    {"final_softcap": 0.0},
    {"query_scalar": 0},
    {"full_attention_every": 0},
    {"full_attention_every": 3},
    {"sliding_window": 8},
  ],
  ids=str,
)
def test_every_field_of_gemma_is_in_its_maths(change, gemma):
  config = open_model(gemma).config
  tokens = np.random.default_rng(0).integers(0, 97, (2, 20))
  changed = our_logits(gemma, tokens, dataclasses.replace(config, **change))
  assert np.abs(changed - our_logits(gemma, tokens)).max() > 1e-2


def test_a_published_gemma_config_is_read_with_its_defaults_and_its_surplus():
  published = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256_000, "hidden_size": 3584,
    "intermediate_size": 14_336, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
    "hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096, "cache_implementation": "hybrid",
  }  # fmt: skip
  config = read_config(published, {})[1]
  assert (config.head_dim, config.query_scalar, config.sliding_window, config.tie_embeddings) == (256, 256, 4096, True)
  assert (config.attention_softcap, config.final_softcap, config.activation) == (50, 30, "geglu_tanh")
  assert config.windows == (4096, 0) * 21
  assert read_config(published | {"final_logit_softcapping": None}, {})[1].final_softcap == 0
  assert isinstance(read_config(published | {"final_logit_softcapping": 30}, {})[1].final_softcap, float)
  alternating = ["sliding_attention", "full_attention"] * 21
  assert read_config(published | {"layer_types": alternating}, {})[1] == config
  for surplus, sentence in (
    ({"layer_types": alternating[::-1]}, "layer_types = .'full_attention', 'sliding"),
    ({"layer_types": ["full_attention"] * 42}, "layer_types = .'full_attention', 'full"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"hidden_activation": "tanh"}, "hidden_activation 'tanh' is not supported"),
    ({"query_pre_attn_norm": True}, "query_pre_attn_norm = True is not supported"),
    ({"sliding_window": None}, "there is no sliding_window"),
  ):
    with pytest.raises(UserError, match=sentence):
      read_config(published | surplus, {})


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"final_softcap": 30.0}, "llama is nearest and cannot have final_softcap = 30.0"),
    ({"norm_offset": 1.0, "query_scalar": 3}, "cannot have query_scalar = 3, norm_offset = 1.0"),
    ({"post_norms": True}, "llama is nearest and cannot have post_norms = True"),
  ],
)
def test_a_model_that_no_class_of_transformers_has_is_not_exported(change, sentence):
  with pytest.raises(UserError, match=sentence):
    export_format(dataclasses.replace(PRESETS["tiny"], **change), "float32")


def test_a_sharded_checkpoint_reads_like_a_whole_one(tmp_path):
  reference = save_huggingface(tmp_path / "whole", *CASES["llama"])
  reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
  assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
  whole, sharded = (parameters(open_model(tmp_path / name)) for name in ("whole", "sharded"))
  jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def damaged(change):
  """A test case: `change(folder, fields of config.json)` damages a good directory; fields are written back."""

  def apply(folder):
    fields = json.loads((folder / "config.json").read_text())
    change(folder, fields)
    (folder / "config.json").write_text(json.dumps(fields))

  return apply


def truncate(folder, size):
  os.truncate(folder / "model.safetensors", size)


def save_tensors(folder, name, value, names):
  save_file({tensor: np.full((2, 2), value, np.float32) for tensor in names}, folder / name)


@pytest.mark.parametrize("other", ["adapter_model", "consolidated", "model.fp16", "zzz"])
def test_model_safetensors_is_taken_whatever_lies_beside_it(tmp_path, other):
  save_tensors(tmp_path, "model.safetensors", 1, "ab")
  save_tensors(tmp_path, f"{other}.safetensors", 2, "abc")
  assert {name: tensor.file.name for name, tensor in _tensors(tmp_path).items()} == dict.fromkeys(
    "ab", "model.safetensors"
  )


def test_two_files_with_a_tensor_of_one_name_are_told_apart_by_the_index_alone(tmp_path):
  save_tensors(tmp_path, "one.safetensors", 1, "ab")
  save_tensors(tmp_path, "two.safetensors", 2, "bc")
  with pytest.raises(UserError, match=r"one\.safetensors and two\.safetensors both hold a tensor b"):
    _tensors(tmp_path)
  for b, mapped in (("one", "two"), ("two", "one"), ("one", "model")):  # the last: an index of other files
    files = {"a": "one.safetensors", "b": f"{b}.safetensors", "c": "two.safetensors", "head": f"{mapped}.safetensors"}
    if mapped == "model":
      save_tensors(tmp_path, "model.safetensors", 3, "d")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read = {name: tensor.file.name for name, tensor in _tensors(tmp_path).items()}
    assert read == {name: files[name] for name in "abc"} | ({"d": "model.safetensors"} if mapped == "model" else {})
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
  assert set(_tensors(tmp_path)) == {"a", "b"}  # transformers would read model.safetensors: this is warned of


def index_of_missing(folder, _):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-2.safetensors"}}))


def index_outside(folder, _):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def index_of(content):
  return lambda folder, _: (folder / "model.safetensors.index.json").write_text(content)


def pickle_only(folder, _):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (lambda folder, fields: truncate(folder, 5), "model.safetensors is damaged"),
    (lambda folder, fields: truncate(folder, 1000), "model.safetensors is damaged"),
    (lambda folder, fields: truncate(folder, 40_000), "model.safetensors is damaged"),
    (pickle_only, "only pickle files"),
    (index_of_missing, "model-2.safetensors is missing"),
    (index_outside, "outside its folder"),
    (index_of('{"weight_map": {"x": ".."}}'), "outside its folder"),
    (index_of('{"weight_map": {"x": 3}}'), "index.json is damaged"),
    (index_of('{"weight_map": {"x": ["y"]}}'), "index.json is damaged"),
    (index_of("[]"), "index.json is damaged"),
    (lambda folder, fields: fields.update(model_type="tsparse_llama"), "activation 'None' is unknown"),
    (lambda folder, fields: fields.update(model_type="tsparse_llama", ffn_activation=["drelu"]), "is unknown"),
    (lambda folder, fields: fields.update(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 and there are 21"),
    (lambda folder, fields: (folder / "model.safetensors").unlink(), "no .safetensors file"),
    (lambda folder, fields: fields.update(model_type="gpt2"), "'gpt2' is not supported; choose one of llama"),
    (lambda folder, fields: fields.update(hidden_act="tanh"), "hidden_act 'tanh'"),
    (lambda folder, fields: fields.update(attention_bias=True), "attention_bias = True"),
    (lambda folder, fields: fields.update(qk_norm=True), "qk_norm = True"),
    (lambda folder, fields: fields.update(intermediate_size=50), r"shape \(48, 32\) and config.json makes it"),
    (lambda folder, fields: fields.update(num_hidden_layers=3), "it lacks model.layers.2"),
    (lambda folder, fields: fields.update(num_hidden_layers=1), "nothing takes model.layers.1"),
    (lambda folder, fields: fields.pop("hidden_size"), "lacks hidden_size"),
  ],
)
def test_a_damaged_or_unsupported_checkpoint_is_one_sentence_and_no_output(change, sentence, tmp_path, source):
  folder = tmp_path / "theirs"
  shutil.copytree(source, folder)
  damaged(change)(folder)
  with pytest.raises(UserError, match=sentence):
    convert(folder, tmp_path / "out", "tsparse")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}
LLAMA3_TEXT = "llama3:factor=8,low_freq_factor=1,high_freq_factor=4,original_max_position_embeddings=32"


@pytest.mark.parametrize(
  ("rope", "theta", "scaling"),
  [
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, "linear:factor=2"),
    ({"rope_scaling": {"type": "default"}, "rope_theta": 500}, 500, ""),
    ({"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_theta": 5e5}, 5e5, LLAMA3_TEXT),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3, "rope_theta": 7}, 5e5, LLAMA3_TEXT),
    ({"rope_parameters": None, "rope_scaling": None, "rope_theta": 300.5}, 300.5, ""),
    # left out, the original length is max_position_embeddings; nulls are left out
    (
      {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 1.5, "mscale": None, "truncate": False}},
      1e4,
      "yarn:factor=1.5,truncate=0,original_max_position_embeddings=64",
    ),
  ],
)
def test_both_layouts_of_rotary_positions_are_read_as_transformers_does(rope, theta, scaling, source):
  import transformers

  fields = json.loads((source / "config.json").read_text())
  del fields["rope_parameters"]
  config = read_config(fields | rope, {})[1]
  assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
  read = transformers.LlamaConfig(**json.loads(json.dumps(fields | rope))).rope_parameters
  written = transformers.LlamaConfig(**export_format(config, "float32")[0]).rope_parameters
  assert {k: v for k, v in read.items() if v is not None and k != "type"} == written


@pytest.mark.parametrize(
  ("rope", "sentence"),
  [
    ({"type": "dynamic", "factor": 2}, "rope_scaling = .*dynamic.* only default, linear, llama3, yarn are"),
    ({"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}, "rope_scaling = .*longrope"),
    ({"rope_type": ["linear"], "factor": 2}, r"rope_scaling = .*\['linear'\]"),
    ({"rope_type": "linear", "type": "yarn", "factor": 2}, "rope_scaling = .*'type=yarn'|.*'type': 'yarn'"),
    ({"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, "'partial_rotary_factor=0.5' should be"),
    ({"rope_type": "linear", "factor": "2"}, "{'factor': '2'} should be numbers"),
    ({"rope_type": "linear"}, "rope_scaling = .*linear.* is not supported"),
    ({"rope_type": "default", "factor": 2}, "plain rotary positions take no factor"),
    ({"full_attention": {"rope_type": "default"}}, "plain rotary positions take no full_attention"),
    ({"rope_theta": None}, "rope_theta None is not a number"),
    ("linear", "rope_scaling = linear is not supported"),
  ],
)
def test_other_rotary_positions_are_refused_by_name_and_value(rope, sentence, source):
  fields = json.loads((source / "config.json").read_text())
  with pytest.raises(UserError, match="only one of them can hold"):
    read_config(fields | {"rope_scaling": rope}, {})
  del fields["rope_parameters"]
  with pytest.raises(UserError, match=sentence):
    read_config(fields | {"rope_scaling": rope}, {})


def test_weights_that_are_not_finite_are_named(source, tmp_path, caplog):
  from safetensors.numpy import save_file

  shutil.copytree(source, tmp_path / "theirs")
  held = tensors(source)
  held["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
  save_file(held, tmp_path / "theirs" / "model.safetensors")
  parameters(open_model(tmp_path / "theirs"))
  assert [record.args[0] for record in caplog.records] == ["model.layers.1.mlp.up_proj.weight"]


def test_random_damage_is_a_sentence_or_harmless(source, tmp_path):
  rng = np.random.default_rng(0)
  refused = 0
  for attempt in range(60):
    folder = tmp_path / str(attempt)
    shutil.copytree(source, folder)
    path = folder / ("config.json" if attempt % 2 else "model.safetensors")
    content = bytearray(path.read_bytes())
    for position in rng.integers(0, min(len(content), 3000), 3):  # in the header, of a safetensors file
      content[position] = rng.integers(0, 256)
    path.write_bytes(content)
    try:
      parameters(open_model(folder))
    except UserError:
      refused += 1
  assert refused > 20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hf")
  save_huggingface(folder, *CASES["llama"])
  return folder


def test_a_checkpoint_names_no_file_outside_its_folder(source, tmp_path):
  shutil.copytree(source, tmp_path / "theirs")
  damaged(lambda _, fields: fields.update(tsparse_vocabulary="/etc"))(tmp_path / "theirs")
  assert open_model(tmp_path / "theirs").vocabulary == str(tmp_path / "theirs")


@pytest.mark.parametrize("content", ["null", "3", '"model_type"', "[" * 100_000])
def test_a_config_that_is_no_object_is_one_sentence(content, tmp_path):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(UserError, match="config.json (is not a JSON object|cannot be read)"):
    open_model(tmp_path)


def test_the_current_folder_is_not_replaced(source, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="--out=. is the current folder"):
    convert(source, Path("."), "hf")
  assert not list(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_is_written_through(source, tmp_path):
  (tmp_path / "disk").mkdir()
  (tmp_path / "out").symlink_to("disk")
  convert(source, tmp_path / "out", "hf")
  assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "config.json").exists()


def test_a_folder_in_use_is_left_alone(source, tmp_path):
  (tmp_path / "mine").write_text("kept")
  with pytest.raises(UserError, match="in use"):
    convert(source, tmp_path, "hf")
  assert (tmp_path / "mine").read_text() == "kept"


def test_the_real_model_has_its_reference_loss(shared_data):
  from tsparse.data import bos_id, load_vocabulary

  path = shared_data / "stories260k"
  vocabulary = load_vocabulary(str(path / "tokenizer.model"))
  model = open_model(path)
  lines = (shared_data / "tinystories" / "valid_v2.jsonl").read_text().splitlines()[:60]
  params = parameters(model)
  apply = jax.jit(Transformer(model.config).apply)
  total, count = 0.0, 0
  for line in lines:
    ids = np.array([[bos_id(vocabulary), *vocabulary.encode(json.loads(line)["text"])]])[:, :512]
    row = np.zeros((1, 512), np.int32)
    row[:, : ids.shape[1]] = ids
    logits, _ = apply({"params": params}, row, row * 0 + 1, np.arange(512)[None])
    logp = np.asarray(jax.nn.log_softmax(logits))[0, : ids.shape[1] - 1]
    total -= logp[np.arange(len(logp)), ids[0, 1:]].sum()
    count += len(logp)
  assert total / count == pytest.approx(1.301, abs=2e-3)

  greedy = [bos_id(vocabulary)]
  for _ in range(90):
    row = np.zeros((1, 512), np.int32)
    row[0, : len(greedy)] = greedy
    greedy.append(
      int(apply({"params": params}, row, row * 0 + 1, np.arange(512)[None])[0][0, len(greedy) - 1].argmax())
    )
  assert vocabulary.decode(greedy[1:]).startswith(
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
  )


@pytest.mark.parametrize("recipe", ["plain", "best"])
def test_the_real_model_is_made_sparse_exported_and_read_again(recipe, shared_data, tmp_path):
  config = stories_relufy.get_config(recipe)
  config.init = str(shared_data / "stories260k")
  config.data.vocabulary = str(shared_data / "stories260k" / "tokenizer.model")
  config.data.train = str(shared_data / "tinystories" / "train.jsonl")
  config.data.validation = str(shared_data / "tinystories" / "valid_v2.jsonl")
  config.train.update({"steps": 30, "warmup_steps": 5, "batch_size": 8})
  config.analysis.update({"tokens": 6000, "batch_size": 8, "levels": (0.5,)})
  analysis = experiment.run(config, tmp_path / "run", Console(quiet=True))
  base, between, trained = analysis["models"]
  assert 1.2 < base["loss"] < 1.5 and base["trained_tokens"] is None
  if recipe == "plain":
    assert between["loss"] > 5 and between["zero_fraction"]["mean"] == pytest.approx(0.75, abs=0.03)
    assert trained["loss"] < between["loss"] - 2
  else:
    control = open_model(tmp_path / "run" / "control").config
    assert (between["name"], control.activation, control.hidden_thresholds) == ("control", "swiglu", False)
    zeros = [layer * 6000 * control.d_ff for layer in between["zero_fraction"]["per_layer"]]
    assert max(zeros) < 1.5  # a float32 `up` of millions is exactly 0 by chance, and nothing else is
    assert between["loss"] < trained["loss"] < 1.9 and trained["zero_fraction"]["mean"] == pytest.approx(0.8, abs=0.02)

  convert(tmp_path / "run", tmp_path / "out", "hf")
  assert (tmp_path / "out" / "tokenizer.model").exists() and open_model(tmp_path / "out").bos == "on"
  again = open_model(tmp_path / "out")
  made = {"plain": ("drelu", False), "best": ("swiglu", True)}
  assert (again.config.activation, again.config.hidden_thresholds) == made[recipe]
  jax.tree.map(np.testing.assert_array_equal, parameters(again), parameters(open_model(tmp_path / "run")))
