"""GGUF files read back by the gguf package: every tensor bit for bit, every field; and what is refused."""

import dataclasses
import io
import json
import resource
import shutil
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader
from rich.console import Console
from safetensors.numpy import save_file

from tests.convert import test_sparse_families as published
from tests.convert.test_sparse_families import BASE, HEAD, HEADS, KV_HEADS, LAYERS, D, F, numpy_logits
from tsparse.convert import gguf
from tsparse.convert.convert import convert
from tsparse.convert.model import open_model
from tsparse.errors import RunFailure, UserError
from tsparse.sparse.predictors import stored

V = 264  # bytes, and rows that no byte needs
BYTES = {"vocab_size": V, "tsparse_vocabulary": "bytes"}
RANKS = (5, 9, 7)
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 4.0}
CASES = {
  "llama": {"model_type": "llama", "hidden_act": "silu"},
  "tied": {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True, "rope_scaling": LLAMA3},
  "linear": {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 7, "rope_scaling": LINEAR},
  "mixtral": {
    "model_type": "mixtral", "hidden_act": "silu", "sliding_window": None, "num_local_experts": 4,
    "num_experts_per_tok": 2,
  },
  "qwen2": {"model_type": "qwen2", "hidden_act": "silu"},
  "drelu": {"model_type": "bamboo", "sliding_window": 7},
  "relu": {"model_type": "llama", "tie_word_embeddings": True},
}  # fmt: skip


def write(folder, case, dtype="float32", ranks=(), **more):
  """A checkpoint in the published layout; its tensors and the fields of its config.json."""
  fields = BASE | BYTES | CASES[case] | more
  kind = {"mixtral": "turbosparsemixtral"}.get(fields["model_type"], fields["model_type"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(published, "V", V)
    shapes = published.shapes_of({"model_type": kind}, ranks)
  if fields["tie_word_embeddings"]:
    del shapes["lm_head.weight"]
  if case == "qwen2":
    sizes = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    shapes |= {f"model.layers.{i}.self_attn.{x}_proj.bias": (n,) for i in range(LAYERS) for x, n in sizes.items()}
  rng = np.random.default_rng(0)
  weights = {
    name: (rng.normal(0, 0.25, shape) + (len(shape) == 1)).astype(jnp.dtype(dtype)) for name, shape in shapes.items()
  }
  folder.mkdir()
  save_file(weights, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(fields))
  return weights, fields


def read(path, magic=b"GGUF"):
  """(field -> value, tensor -> array, tensor -> type) of a file, by the gguf package."""
  data = bytearray(path.read_bytes())
  assert data[:4] == magic
  data[:4] = b"GGUF"
  (plain := path.with_suffix(".plain")).write_bytes(data)
  reader = GGUFReader(plain)
  assert reader.alignment == 32 and reader.fields["GGUF.version"].contents() == 3
  fields = {name: field.contents() for name, field in reader.fields.items()}
  kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
  tensors = {
    x.name: x.data.view(jnp.bfloat16) if x.tensor_type.name == "BF16" else np.array(x.data) for x in reader.tensors
  }
  assert all(list(tensors[x.name].shape) == list(reversed(x.shape.tolist())) for x in reader.tensors)
  plain.unlink()
  return fields, tensors, kinds


def interleaved(weight, heads):
  """Rows of a head: half after half -> pair after pair, as llama.cpp's own converter turns them."""
  return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.predictor.fc1": "fc1",
  "mlp.predictor.fc2": "fc2", "block_sparse_moe.gate": "ffn_gate_inp",
  "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def expected(weights, dtype, halves=False):
  """Their tensors by llama.cpp's names, in the dtypes of a file."""
  found = {}
  for name, weight in weights.items():
    name = name.replace("model.layers", "blk")
    for theirs, ours in NAMES.items():
      name = name.replace(f"{theirs}.", f"{ours}.")
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    if heads and not halves:
      weight = interleaved(weight, heads)
    vector = weight.ndim == 1 or "ffn_gate_inp" in name
    found[name] = weight.astype(np.float32 if vector else jnp.dtype(dtype))
  for layer in range(LAYERS):
    for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
      names = [f"blk.{layer}.block_sparse_moe.experts.{e}.{theirs}.weight" for e in range(4)]
      if names[0] in found:
        found[f"blk.{layer}.ffn_{ours}_exps.weight"] = np.stack([found.pop(name) for name in names])
  return found


def expect(tensors, wanted):
  assert tensors.keys() == wanted.keys()
  for name, tensor in wanted.items():
    assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
    assert tensors[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
  ("case", "dtype", "asked"),
  [
    ("llama", "float32", ""),
    ("tied", "bfloat16", ""),
    ("linear", "float16", "float16"),
    ("mixtral", "bfloat16", "float32"),
    ("qwen2", "float32", "bfloat16"),
  ],
)
def test_every_tensor_and_field_of_a_stock_file_is_the_models(case, dtype, asked, tmp_path):
  weights, _ = write(tmp_path / "theirs", case, dtype)
  printed = io.StringIO()
  convert(tmp_path / "theirs", tmp_path / "out", "gguf", dtype=asked, console=Console(file=printed))
  windows = "warning: the file says a context of 7 tokens, not 64: its readers know no windows.\n"
  assert printed.getvalue().count(windows) == (case == "linear")
  fields, tensors, kinds = read(tmp_path / "out" / "model.gguf")
  factors = tensors.pop("rope_freqs.weight", None)
  expect(tensors, expected(weights, asked or dtype, halves=case == "qwen2"))
  kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[asked or dtype]
  assert kinds["blk.0.attn_q.weight"] == kind and fields["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[kind]
  arch = fields["general.architecture"]
  assert arch == ("qwen2" if case == "qwen2" else "llama") and fields["general.name"] == "theirs"
  said = {
    "context_length": 7 if case == "linear" else 64, "embedding_length": D, "block_count": LAYERS,
    "feed_forward_length": F, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": V,
    "attention.key_length": HEAD, "attention.value_length": HEAD, "rope.dimension_count": HEAD,
    "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
  }  # fmt: skip
  said |= {"expert_count": 4, "expert_used_count": 2} if case == "mixtral" else {}
  said |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0} if case == "linear" else {}
  assert {name.removeprefix(f"{arch}."): x for name, x in fields.items() if name.startswith(f"{arch}.")} == said
  if case == "tied":  # f_i / factor_i is f_i where a turn is short beside 64 tokens, f_i / 8 where it is long
    turns = 64 / (2 * np.pi) * 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    kept = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(factors, 1 / (kept + (1 - kept) / 8), rtol=1e-6)
  else:
    assert factors is None


@pytest.mark.parametrize(("case", "architecture", "asked"), [("drelu", "bamboo", ""), ("relu", "llama", "float32")])
def test_every_tensor_and_field_of_powerinfers_file_is_the_models(case, architecture, asked, tmp_path):
  dtype = asked or "float16"  # of bfloat16 weights: all of these fit
  weights, _ = write(tmp_path / "theirs", case, "bfloat16", RANKS)
  if case == "relu":  # predictors of its own, in another folder
    weights = with_trained(tmp_path, weights, thresholds=(-0.5, -0.5, -0.5))
  out = tmp_path / "out"
  convert(tmp_path / "theirs", out, "powerinfer", dtype=asked, predictors=tmp_path / "p" if case == "relu" else None)
  fields, tensors, _ = read(out / "model.powerinfer.gguf", b"PWRI")
  wanted = expected(weights, dtype)
  for layer in range(LAYERS):
    wanted[f"blk.{layer}.ffn_down_t.weight"] = wanted.pop(f"blk.{layer}.ffn_down.weight").T.copy()
    assert tensors[f"blk.{layer}.fc1.weight"].shape == (RANKS[layer], D)
    assert tensors[f"blk.{layer}.fc2.weight"].shape == (F, RANKS[layer])
  wanted.setdefault("output.weight", wanted["token_embd.weight"])  # PowerInfer ties nothing
  expect(tensors, wanted)
  assert fields["general.architecture"] == architecture
  assert fields[f"{architecture}.context_length"] == (7 if case == "drelu" else 64)
  powerinfer = {name: value for name, value in fields.items() if name.startswith("powerinfer.")}
  assert powerinfer == ({"powerinfer.sparse_threshold": -0.5} if case == "relu" else {})


def with_trained(tmp_path, weights, thresholds, model="theirs", source="before_norm"):
  """Moves the predictors of a checkpoint to a folder of their own, with thresholds."""
  theirs, folder = tmp_path / model, tmp_path / "p"
  predictors = {name: weights[name] for name in weights if "predictor" in name}
  save_file({name: x for name, x in weights.items() if name not in predictors}, theirs / "model.safetensors")
  model = open_model(theirs)
  names = [f"model.layers.{i}.mlp.predictor" for i in range(LAYERS)]
  fc1, fc2 = ([np.float32(predictors[f"{name}.{part}.weight"]).T for name in names] for part in ("fc1", "fc2"))
  most = max(RANKS)
  values = {
    "fc1": np.stack([np.pad(x, [(0, 0), (0, most - x.shape[1])]) for x in fc1]),
    "fc2": np.stack([np.pad(x, [(0, most - x.shape[0]), (0, 0)]) for x in fc2]),
    "threshold": np.array(thresholds, np.float32),
  }
  folder.mkdir()
  config = stored.with_predictors(model.config, RANKS, source)
  stored.save(folder, model, config, values, {"recall": 0.95, "read": {}})
  return weights


def test_thresholds_of_layers_become_one_and_choose_the_same_neurons(tmp_path):
  thresholds = np.array([-0.25, -1, -2], np.float32)
  weights, _ = write(tmp_path / "theirs", "relu", ranks=RANKS)
  with_trained(tmp_path, weights, thresholds)
  convert(tmp_path / "theirs", tmp_path / "out", "powerinfer", dtype="float32", predictors=tmp_path / "p")
  fields, tensors, _ = read(tmp_path / "out" / "model.powerinfer.gguf", b"PWRI")
  x = np.random.default_rng(1).standard_normal((200, D))
  for layer, threshold in enumerate(thresholds):
    prefix = f"model.layers.{layer}.mlp.predictor."
    logits = np.maximum(x @ weights[f"{prefix}fc1.weight"].T, 0) @ weights[f"{prefix}fc2.weight"].T
    theirs = np.maximum(x @ tensors[f"blk.{layer}.fc1.weight"].T, 0) @ tensors[f"blk.{layer}.fc2.weight"].T
    clear = np.abs(logits - threshold) > 1e-5
    kept = theirs >= fields["powerinfer.sparse_threshold"]
    assert 0.1 < kept.mean() < 0.99 and clear.mean() > 0.99
    np.testing.assert_array_equal(kept[clear], (logits > threshold)[clear])

  shutil.rmtree(tmp_path / "p")
  save_file(weights, tmp_path / "theirs" / "model.safetensors")
  with_trained(tmp_path, weights, (-0.25, 0.0, 0.25))
  with pytest.raises(UserError, match=r"from -0.25 to 0.25, across 0: train them for a higher --recall"):
    convert(tmp_path / "theirs", tmp_path / "no", "powerinfer", predictors=tmp_path / "p")


def test_pairs_of_neighbours_turn_as_halves_of_a_head_did(tmp_path):
  """The scores of llama.cpp's rotary positions over its queries and keys are those of Hugging Face over theirs."""
  weights, _ = write(tmp_path / "theirs", "llama")
  convert(tmp_path / "theirs", tmp_path / "out", "gguf")
  _, tensors, _ = read(tmp_path / "out" / "model.gguf")
  x = np.random.default_rng(1).standard_normal((11, D))
  angle = np.arange(11)[:, None, None] * 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
  turn = np.exp(1j * angle)

  def heads(weight):
    return (x @ np.float64(weight).T).reshape(11, -1, HEAD)

  for layer in range(LAYERS):
    q, k = (heads(weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]) for name in "qk")
    half = HEAD // 2
    q, k = (turn * (each[..., :half] + 1j * each[..., half:]) for each in (q, k))
    theirs_q, theirs_k = (heads(tensors[f"blk.{layer}.attn_{name}.weight"]) for name in "qk")
    theirs_q, theirs_k = (turn * (each[..., ::2] + 1j * each[..., 1::2]) for each in (theirs_q, theirs_k))
    np.testing.assert_allclose(theirs_q, q)
    np.testing.assert_allclose(theirs_k, k)


def test_llama_cpp_computes_the_logits_of_numpy(tmp_path):
  llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
  weights, fields = write(tmp_path / "theirs", "llama")
  convert(tmp_path / "theirs", tmp_path / "out", "gguf")
  exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # keys and values in float32
  model = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, **exact)
  text = "naïve café\n  12"
  tokens = model.tokenize(text.encode())
  assert tokens == [0, *(byte + 3 for byte in text.encode())] and model.detokenize(tokens) == text.encode()
  model.eval(tokens)
  logits = np.array(model.scores[: len(tokens)])
  np.testing.assert_allclose(logits, numpy_logits(weights, fields, tokens), atol=1e-4, rtol=0)


REFUSED = {
  "drelu, gguf": r"knows nothing of the activation drelu: use --format=powerinfer",
  "llama, powerinfer": r"computes relu and drelu, and the activation of .* is swiglu: give it zeros first",
  "mixtral, powerinfer": r"computes models like llama and mistral, and .* is like mixtral",
  "relu, powerinfer": r"wants a neuron predictor for each layer, and .* has none: train them by",
  "drelu, powerinfer, bfloat16": r"reads no bfloat16: choose float16 or float32",
  "drelu, powerinfer, int8": r"--dtype=int8 is unknown: choose float32, float16 or bfloat16",
  "drelu, tsparse, float16": r"--dtype=float16 is unknown: choose float32 or bfloat16",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_file_cannot_say_is_refused(what, tmp_path):
  case, form, dtype = (what + ", ").split(", ")[:3]
  write(tmp_path / "theirs", case, ranks=RANKS if case == "drelu" else ())
  with pytest.raises(UserError, match=REFUSED[what]):
    convert(tmp_path / "theirs", tmp_path / "out", form, dtype=dtype)
  assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(("case", "plan"), [("llama", gguf.plan_llama_cpp), ("drelu", gguf.plan_powerinfer)])
def test_thresholds_of_the_hidden_are_refused(case, plan, tmp_path):
  write(tmp_path / "theirs", case, ranks=RANKS if case == "drelu" else ())
  model = open_model(tmp_path / "theirs")
  model = dataclasses.replace(model, config=dataclasses.replace(model.config, hidden_thresholds=True))
  with pytest.raises(UserError, match="knows nothing of thresholds of the hidden"):
    plan(model, {}, "")


def test_other_families_scalings_and_inputs_are_refused(tmp_path):
  from tests.convert.test_streaming import parameters, write_huggingface
  from tsparse.models.config import PRESETS

  gemma = PRESETS["tiny"].__class__(**{
    **vars(PRESETS["tiny"]), "d_model": 16, "d_ff": 16, "num_layers": 1, "norm_offset": 1.0, "post_norms": True,
    "scale_embeddings": True, "tie_embeddings": True, "activation": "geglu_tanh", "attention_softcap": 50.0,
    "final_softcap": 30.0, "query_scalar": 256, "sliding_window": 8, "full_attention_every": 2,
  })  # fmt: skip
  write_huggingface(tmp_path / "gemma2", parameters(gemma), gemma)
  yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
  write(tmp_path / "yarn", "llama", rope_scaling=yarn)
  write(tmp_path / "llama3", "drelu", ranks=RANKS, rope_scaling=LLAMA3)
  write(tmp_path / "mixtral", "mixtral")
  for name, form, sentence in (
    ("gemma2", "gguf", r"writes models like llama, mistral, mixtral, qwen2; .* is like gemma2"),
    ("yarn", "gguf", r"scaled by yarn cannot be written, only by linear, llama3"),
    ("llama3", "powerinfer", r"scaled by llama3 cannot be written, only by linear"),
  ):
    with pytest.raises(UserError, match=sentence):
      convert(tmp_path / name, tmp_path / "out", form)
  with pytest.raises(UserError, match=r"--predictors=x is for --format=powerinfer"):
    convert(tmp_path / "mixtral", tmp_path / "out", "gguf", predictors="x")
  with pytest.raises(UserError, match=r"written into a folder, give its name without .gguf"):
    convert(tmp_path / "mixtral", tmp_path / "out.gguf", "gguf")
  weights, _ = write(tmp_path / "after", "drelu", ranks=RANKS)
  with_trained(tmp_path, weights, (0, 0, 0), "after", "after_norm")
  with pytest.raises(UserError, match=r"read the residual stream before the norm, and these read it after"):
    convert(tmp_path / "after", tmp_path / "out", "powerinfer", predictors=tmp_path / "p")
  assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
  weights, _ = write(tmp_path / "theirs", "drelu", "bfloat16", RANKS)
  weights["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e5
  save_file(weights, tmp_path / "theirs" / "model.safetensors")
  with pytest.raises(UserError, match=r"tensor blk.2.ffn_up.weight holds 99840, and float16 ends at 65504: choose"):
    convert(tmp_path / "theirs", tmp_path / "out", "powerinfer")
  assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_room_is_checked_before_and_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  write(tmp_path / "theirs", "llama")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # bytes of one file
  try:
    with pytest.raises(RunFailure, match=r"could not be written \(.*\) and is not there: make room"):
      convert(tmp_path / "theirs", tmp_path / "out", "gguf")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
  with pytest.raises(UserError, match=r"needs [\d.]+ kB and its disk has 100.0 kB left"):
    convert(tmp_path / "theirs", tmp_path / "out", "gguf")
  assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_two_tensors_at_most_are_held_while_a_file_is_written(tmp_path):
  """The one being written, and the one before it that Python has not let go of."""
  write(tmp_path / "theirs", "llama")
  model, alive, most = open_model(tmp_path / "theirs"), set(), 0

  class Part(np.ndarray):  # can be referenced weakly
    pass

  def watched(leaf):
    def read(index):
      nonlocal most
      part = np.array(leaf.read(index)).view(Part)
      alive.add(id(part))
      weakref.finalize(part, alive.discard, id(part))
      most = max(most, len(alive))
      return part

    return gguf.Leaf(leaf.shape, leaf.dtype, leaf.depth, read)

  plan = gguf.plan_llama_cpp(model, {name: watched(leaf) for name, leaf in model.leaves()[0].items()}, "")
  gguf.write(plan, plan.tensors, tmp_path)
  assert (tmp_path / "model.gguf").is_file() and 1 <= most <= 2 and not alive
