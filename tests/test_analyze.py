"""`experiments/analyze.py`: stored models on a text, against transformers, and what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from tests.convert.test_huggingface import save_huggingface
from tsparse.analysis import run as analysis_run
from tsparse.analysis.run import parse_levels, unique_names
from tsparse.convert.convert import convert
from tsparse.convert.model import open_model
from tsparse.data import DataSettings, bos_id, evaluation_batches, load_vocabulary
from tsparse.errors import UserError

TEXTS = [f"story {i}: " + "the cat sat. " * (i % 9) for i in range(40)]  # up to 118 bytes, of 64 positions


def analyze(models, data, out, **settings):
  settings = {"levels": (), "tokens": 10**6, "parts": ("counts",), "console": Console(quiet=True)} | settings
  return analysis_run.run([str(m) for m in models], str(data), out, **settings)


def save_texts(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


def save_bytes_model(folder, **fields):
  """A random ReLU model over bytes, as a Hugging Face directory; returns it as transformers has it."""
  model = save_huggingface(folder, "Llama", {"vocab_size": 264, "hidden_act": "relu"} | fields)
  config = json.loads((folder / "config.json").read_text()) | {"tsparse_vocabulary": "bytes", "tsparse_eos": True}
  (folder / "config.json").write_text(json.dumps(config))
  return model


def reference(model, documents, bos, seq_len):
  """Loss, number of tokens and (with ReLU) share of zeros by transformers, one piece of one document at a time."""
  import torch

  zeros = []
  for layer in model.model.layers:
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: zeros.append((inputs[0] == 0).float().mean(-1)))
  nll = []
  for tokens in documents:
    for start in range(0, len(tokens), seq_len):
      piece = torch.tensor(tokens[start : start + seq_len])
      inputs = torch.tensor([[bos, *tokens][start : start + len(piece)]])
      with torch.no_grad():
        logits = model(inputs).logits[0]
      nll.append(torch.nn.functional.cross_entropy(logits, piece, reduction="none"))
  nll = torch.cat(nll)
  return float(nll.mean()), len(nll), float(torch.cat(zeros, 1).mean())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """(folder of a model, text) with which nothing is wrong."""
  folder = tmp_path_factory.mktemp("small")
  save_bytes_model(folder / "model")
  return folder / "model", save_texts(folder / "text.jsonl", TEXTS[:3])


@pytest.mark.parametrize("width", [32, 36], ids=["parameters split over 8 devices", "36 does not divide: copied"])
def test_models_side_by_side_have_the_loss_and_the_zeros_of_transformers(width, tmp_path):
  import torch

  theirs = save_bytes_model(tmp_path / "a" / "model", hidden_size=width, num_attention_heads=2)
  convert(tmp_path / "a" / "model", tmp_path / "b" / "model", "tsparse", activation="drelu")
  text = save_texts(tmp_path / "text.jsonl", TEXTS)
  out = tmp_path / "out" / "here"
  settings = {"levels": (0.0, 0.5), "selections": ("hidden", "gate", "up", "contribution"), "paper": True}
  settings |= {"export": "powerinfer", "also": str(save_texts(tmp_path / "backwards.jsonl", TEXTS[::-1]))}
  made = analyze([tmp_path / "a" / "model", tmp_path / "b" / "model"], text, out, **settings)

  documents = [[byte + 3 for byte in text.encode()] + [1] for text in TEXTS]
  loss, tokens, zeros = reference(theirs, documents, 0, seq_len=64)
  relu, drelu = made["models"]
  assert (relu["name"], drelu["name"], drelu["activation"]) == ("a/model", "b/model", "drelu")
  assert relu["loss"] == pytest.approx(loss, abs=1e-4) and relu["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
  assert (relu["tokens"], relu["documents"], relu["data"]) == (tokens, 40, str(text))  # all of the text
  assert relu["zero_fraction"]["mean"] == pytest.approx(zeros, abs=1e-5) and 0.3 < zeros < 0.7
  assert drelu["zero_fraction"]["mean"] > zeros + 0.1 and drelu["loss"] != relu["loss"]
  assert [point["sparsity"] for point in relu["curve"]] == [0.0, 0.5]
  assert relu["curve"][0]["loss"] == pytest.approx(relu["loss"], rel=1e-5)  # nothing is masked there
  assert relu["dead_neurons"]["total"] == 2 * 48
  assert drelu["parameters"]["activated"] < relu["parameters"]["activated"] < relu["parameters"]["total"]

  assert {path.name for path in (tmp_path / "out").iterdir()} == {"here"}
  assert {path.name for path in out.iterdir()} == {
    "report.html", "analysis.json", "summary.json", "csv", "activation",
    "intervals.png", "perplexity_vs_sparsity.png", "zeros_per_layer.png", "neuron_cdf.png", "neuron_frequency.png",
    "union_zeros.png", "union_speedup.png",
  }  # fmt: skip
  assert [curve["selection"] for curve in drelu["curves"]] == list(settings["selections"])
  assert relu["curves"][0]["points"] == relu["curve"] != relu["curves"][1]["points"]
  for model, found in ((relu, zeros), (drelu, drelu["zero_fraction"]["mean"])):
    fired = [torch.load(out / "activation" / model["name"] / f"activation_{layer}.pt") for layer in (0, 1)]
    assert [x.shape for x in fired] == [(48,), (48,)] and fired[0].dtype == torch.float32
    assert float(sum(x.sum() for x in fired)) == pytest.approx((1 - found) * tokens * 2 * 48, rel=1e-5)
    assert [source["name"] for source in model["sources"]] == [str(text), settings["also"]]  # the same documents
    assert [source["loss"] for source in model["sources"]] == pytest.approx([model["loss"]] * 2)
    (texts,) = model["neurons"]["between"]
    assert texts["hot_overlap"]["mean"] == texts["rank_correlation"]["mean"] == pytest.approx(1)
  (pair,) = made["comparisons"]  # the same documents
  assert pair["difference"] == pytest.approx(drelu["loss"] - relu["loss"]) and pair["interval"][0] < pair["interval"][1]
  assert sum(drelu["per_document"]["tokens"]) == tokens and len(drelu["per_document"]["nll"]) == 40
  assert json.loads((out / "analysis.json").read_text()) == made
  assert json.loads((out / "summary.json").read_text())["seq_len"] == 64


def test_a_real_model_has_the_loss_of_transformers_and_its_own_vocabulary(small, shared_data, tmp_path):
  import transformers

  path = shared_data / "stories260k"
  lines = (shared_data / "tinystories" / "valid_v2.jsonl").read_text().splitlines()[:10]
  (tmp_path / "stories.jsonl").write_text("\n".join(lines))
  made = analyze([path, small[0]], tmp_path / "stories.jsonl", tmp_path / "out", seq_len=64, levels=(0.5,))

  vocabulary = load_vocabulary(str(path / "tokenizer.model"))
  documents = [vocabulary.encode(json.loads(line)["text"]) for line in lines]  # it was trained without EOS
  theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
  loss, tokens, _ = reference(theirs, documents, bos_id(vocabulary), seq_len=64)
  stories, other = made["models"]
  assert stories["loss"] == pytest.approx(loss, abs=1e-4) and stories["tokens"] == tokens
  assert stories["zero_fraction"]["mean"] == 0 and stories["curve"][0]["loss"] > stories["loss"]
  assert other["tokens"] == sum(len(json.loads(line)["text"].encode()) for line in lines)  # so neither has
  assert not stories["eos"] and "end-of-text tokens not scored" in stories["data"]
  assert "Vocabularies differ" in str(json.loads((tmp_path / "out" / "summary.json").read_text())["notes"])


def test_a_model_without_bos_is_scored_as_it_was_trained_and_bos_can_be_asked_for(tmp_path):
  theirs = save_bytes_model(tmp_path / "model")
  config = json.loads((tmp_path / "model" / "config.json").read_text())
  (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tsparse_bos": "off"}))
  text = save_texts(tmp_path / "text.jsonl", TEXTS[:12])
  (made,) = analyze([tmp_path / "model"], text, tmp_path / "out", seq_len=64)["models"]
  nll, count = 0.0, 0
  for first, *tokens in ([*(byte + 3 for byte in text.encode()), 1] for text in TEXTS[:12]):
    loss, number, _ = reference(theirs, [tokens], first, seq_len=64)
    nll, count = nll + loss * number, count + number
  assert (made["bos"], made["tokens"]) == (False, count) and made["loss"] == pytest.approx(nll / count, abs=1e-4)
  assert "without BOS" in made["data"]
  model = open_model(tmp_path / "model")
  asked = [analysis_run._own(DataSettings(bos=bos), model).bos for bos in ("auto", "on", "off")]
  assert asked == ["off", "on", "off"]


def test_only_a_part_of_the_text_is_said(small, tmp_path):
  (made,) = analyze([small[0]], small[1], tmp_path / "out", tokens=30)["models"]
  assert made["data"] == f"{small[1]} (a part of it)" and made["documents"] < 3 and made["tokens"] == 30
  assert made["documents_cut"] == 1 and "(cut at the 30 tokens asked for)" in str(
    json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
  )


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"models": ["nowhere"]}, "nowhere holds no model"),
    ({"data": "nothing.jsonl"}, "Cannot read"),
    ({"data": "nothing"}, "Unknown data 'nothing'"),
    ({"data": "{tmp}/empty.jsonl"}, "holds no text"),
    ({"data": "{tmp}/folder"}, "holds no .jsonl, .txt"),
    ({"out": "{tmp}/folder/.."}, "is in use"),
    ({"out": "{tmp}/empty.jsonl"}, "is in use"),
    ({"out": "/dev/null/here"}, "cannot be"),
    ({"models": ["{model}", "{model}/../model"]}, "is given twice"),
    ({"models": ["{tmp}/narrow"]}, "has 259 ids and the model embeds 97"),
    ({"seq_len": 65}, "more than the 64 tokens"),
    ({"data": "{tmp}/short.jsonl"}, "holds 11 tokens, less than a row of 64"),
    ({"selections": ("hidden", "contributions")}, "'contributions' is unknown, the nearest is 'contribution'"),
    ({"batch_size": 12}, "use a multiple of 8"),
    ({"parts": ("experts",)}, "no --model has experts"),
    ({"also": "nothing"}, "Unknown data 'nothing'"),
    ({"memory": 100}, "does not fit"),
  ],
)
def test_what_cannot_be_is_a_sentence_and_nothing_is_written(changes, sentence, small, tmp_path, monkeypatch):
  (tmp_path / "empty.jsonl").write_text("\n")
  save_texts(tmp_path / "short.jsonl", ["ten letters"[:10]])
  (tmp_path / "folder").mkdir()
  save_bytes_model(tmp_path / "narrow", vocab_size=97)
  arguments = {"models": ["{model}"], "data": str(small[1]), "out": "{tmp}/out"} | changes
  memory = arguments.pop("memory", None)
  if memory:
    monkeypatch.setattr(analysis_run.memory, "device_bytes", lambda _: memory)
  arguments["models"] = [m.format(tmp=tmp_path, model=small[0]) for m in arguments["models"]]
  arguments["data"] = arguments["data"].format(tmp=tmp_path)
  out = arguments.pop("out").format(tmp=tmp_path)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match=sentence):
    analyze(**arguments, out=type(tmp_path)(out))
  assert sorted(tmp_path.rglob("*")) == before


def test_logits_that_are_not_finite_are_a_sentence_that_names_the_layer(small, tmp_path):
  shutil.copytree(small[0], tmp_path / "model")
  weights = load_file(tmp_path / "model" / "model.safetensors")
  weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
  save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
  with pytest.raises(UserError, match="not finite: values in layer 1"):
    analyze([tmp_path / "model"], small[1], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_thresholds_are_found_on_documents_that_are_not_evaluated(small, tmp_path):
  model, path = open_model(small[0]), save_texts(tmp_path / "texts.jsonl", TEXTS)
  source = DataSettings(train="", validation=str(path), vocabulary="bytes", eos=True)
  settings = {"seq_len": 64, "batch_size": 8}
  everything = evaluation_batches(source, max_tokens=10**6, **settings)
  assert analysis_run._calibration(model, source, everything, settings) is None  # no others are left
  text = evaluation_batches(source, max_tokens=500, **settings)
  others = analysis_run._calibration(model, source, text, settings)
  assert others.documents + text.documents == everything.documents == 40
  assert (text.tokens, text.cut) == (500, 1)
  longest = max(len(line.encode()) + 1 for line in TEXTS)
  assert 0 <= everything.tokens - others.tokens - text.tokens < longest  # the end of the document that is cut
  text = evaluation_batches(source, max_tokens=everything.tokens - 1, **settings)
  assert not text.complete and analysis_run._calibration(model, source, text, settings) is None


def test_an_analysis_that_fails_leaves_nothing_behind(small, tmp_path, monkeypatch):
  def fail(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(analysis_run, "write_report", fail)
  with pytest.raises(KeyboardInterrupt):
    analyze([small[0]], small[1], tmp_path / "out")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("levels", [["half"], ["1"], ["-0.1"], ["nan"], ["0.5", ""], ["1e400"]])
def test_levels_are_numbers_from_0_to_below_1(levels):
  with pytest.raises(UserError, match="a level is a share of zeros"):
    parse_levels(levels)
  np.testing.assert_array_equal(parse_levels(["0", ".5", "0.99"]), (0, 0.5, 0.99))


def test_names_are_as_short_as_they_can_be():
  assert unique_names(["runs/a", "runs/b/", "/x/c/../d"]) == ["a", "b", "d"]
  assert unique_names(["runs/a", "old/a", "old/b"]) == ["runs/a", "old/a", "old/b"]
