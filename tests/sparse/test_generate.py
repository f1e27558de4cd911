"""Generation as a user meets it: tokens against transformers, text that streams, the command."""

import dataclasses
import io
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.convert.test_huggingface import CASES, save_huggingface
from tests.test_run import run
from tsparse.convert.convert import convert
from tsparse.convert.model import open_model
from tsparse.data import load_tokenizer
from tsparse.errors import UserError
from tsparse.models.config import PRESETS
from tsparse.models.transformer import Transformer, init_parameters
from tsparse.progress import Compiling
from tsparse.sparse.break_even import choose_mode
from tsparse.sparse.generate import (
  GREEDY,
  PIECE,
  Decoder,
  Request,
  choose_modes,
  complete,
  load,
  sparse_mode,
  stream,
  summary,
)
from tsparse.sparse.kernels.table import best_kernels
from tsparse.sparse.layout import arrange, leaves_of
from tsparse.sparse.sample import Sampling, choose, filtered
from tsparse.sparse.text import Stream, encode_prompt, stop_tokens

FAMILIES = ("llama_yarn", "mistral", "qwen2", "olmoe", "gemma2", "mixtral", "qwen2_moe")
PROMPTS = [[3, 14, 15, 92, 65, 35, 8, 9, 79], [31, 41, 5]]


def rows(decoder, prompts, count, sampling=GREEDY):
  return np.stack(list(stream(decoder, prompts, count, sampling)), axis=1).tolist()


@pytest.fixture(scope="module")
def tiny():
  config = dataclasses.replace(
    PRESETS["tiny_moe"], num_layers=2, d_model=32, d_ff=64, head_dim=8, activation="drelu", max_seq_len=64
  )
  params = init_parameters(Transformer(config), jax.random.key(0))
  return Decoder(
    config, arrange(config, leaves_of(params)), "off", best_kernels(config.d_model), load_tokenizer("bytes")
  )


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
  import torch

  theirs = save_huggingface(tmp_path, *CASES[name])
  theirs.generation_config.eos_token_id = None
  model = open_model(tmp_path)  # it has no tokenizer, which `load` would ask for
  decoder = Decoder(model.config, arrange(model.config, model.leaves()[0]), "off", best_kernels(model.config.d_model))
  want = [
    theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    for prompt in PROMPTS
  ]
  assert rows(decoder, PROMPTS, 12) == [row.tolist() for row in want]


def test_a_row_does_not_depend_on_its_neighbours(tiny):
  sampling = Sampling(temperature=1.0, top_k=50, seed=3)
  together = rows(tiny, PROMPTS, 10, sampling)
  assert rows(tiny, [PROMPTS[0], [7] * 20], 10, sampling)[0] == together[0]
  assert rows(tiny, PROMPTS[:1], 10, sampling)[0] == together[0]
  assert rows(tiny, PROMPTS, 10, dataclasses.replace(sampling, seed=4)) != together


def test_a_long_prompt_goes_through_in_pieces(tiny, monkeypatch):
  prompts = [list(range(3, 43)), PROMPTS[1]]
  whole = rows(tiny, prompts, 8)
  monkeypatch.setattr("tsparse.sparse.generate.PIECE", 16)
  assert PIECE > 16 and rows(tiny, prompts, 8) == whole


def test_exact_gives_the_tokens_of_dense_on_experts(tiny):
  assert rows(dataclasses.replace(tiny, mode="exact"), PROMPTS, 20) == rows(tiny, PROMPTS, 20)


def test_a_real_model_tells_its_story_and_loses_no_token_to_skipping(shared_data, tmp_path):
  decoder = load(shared_data / "stories260k")
  assert decoder.mode == "off"
  tokenizer = decoder.tokenizer
  story = tokenizer.decode(rows(decoder, [[tokenizer.bos]], 60)[0])
  assert story.startswith(
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
  )
  convert(shared_data / "stories260k", tmp_path / "ours", "tsparse", activation="drelu", console=Console(quiet=True))
  decoder = load(tmp_path / "ours", dtype="bfloat16")
  prompts = [[tokenizer.bos, *decoder.tokenizer.encode(text)] for text in ("Once upon a time", "The dog")]
  assert decoder.mode == "auto" and decoder.params["layers"][0]["neurons"].gate.dtype == "bfloat16"
  dense, exact, auto = (
    rows(dataclasses.replace(decoder, mode=mode), prompts, 100) for mode in ("off", "exact", "auto")
  )
  assert dense == exact == auto


def test_filters_keep_what_those_of_transformers_keep():
  import torch
  from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

  logits = 3 * jax.random.normal(jax.random.key(0), (4, 50))
  for sampling in (Sampling(0.7, 9), Sampling(1.3, 0, 0.8), Sampling(1.0, 0, 1.0, 0.1), Sampling(0.9, 20, 0.9, 0.05)):
    theirs = TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(np.array(logits)))
    theirs = TopKLogitsWarper(sampling.top_k)(None, theirs) if sampling.top_k else theirs
    theirs = TopPLogitsWarper(sampling.top_p)(None, theirs) if sampling.top_p < 1 else theirs
    theirs = MinPLogitsWarper(sampling.min_p)(None, theirs) if sampling.min_p else theirs
    ours = np.asarray(filtered(sampling, logits))
    assert 0 < np.isinf(ours).sum() < ours.size
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_draws_follow_the_probabilities():
  logits = np.log(np.tile(np.array([[0.6, 0.3, 0.1]], np.float32), (5000, 1)))
  counts = np.bincount(choose(Sampling(temperature=1.0), logits, 0), minlength=3)
  np.testing.assert_allclose(counts / 5000, [0.6, 0.3, 0.1], atol=0.03)
  assert choose(Sampling(), logits, 0).tolist() == [0] * 5000


def test_text_is_shown_once_it_is_certain():
  tokenizer = load_tokenizer("bytes")
  text = Stream(tokenizer, tokenizer.encode("x"), ["END"])
  shown = [text.add(token) for token in tokenizer.encode("aé EN END")]
  assert shown == ["a", "", "é", " ", "", "", "EN ", "", "", ""] and text.stopped and text.text == "aé EN "


@pytest.mark.parametrize("vocabulary", ["bytes", "tokenizers/mistral_v1.model"])
def test_characters_split_over_tokens_read_the_same_streamed_and_whole_wherever_the_text_is_cut(vocabulary, request):
  name = vocabulary if vocabulary == "bytes" else str(request.getfixturevalue("shared_data") / vocabulary)
  tokenizer, said = load_tokenizer(name), " 🫠é 漢字 \ufffd.🫠"
  prompt = tokenizer.encode("It said:")
  tokens = list(tokenizer.encode(f"It said:{said}"))[len(prompt) :]
  for end in range(len(tokens) + 1):
    text = Stream(tokenizer, prompt, ["nowhere"])
    shown = "".join(text.add(token) for token in tokens[:end])
    assert "\ufffd" not in shown.replace("\ufffd.", "")  # half a character waits for the other half
    whole = tokenizer.decode([*prompt, *tokens[:end]]).removeprefix("It said:")
    assert shown + text.rest() == text.text == whole
    assert said.startswith(whole.rstrip("\ufffd"))
  cut = tokenizer.decode(tokens[:-1])  # one U+FFFD for the half, or one for each of its bytes: as the library has it
  assert text.text == said and cut.endswith("\ufffd") and cut.rstrip("\ufffd").endswith(".")


def test_a_chat_is_written_as_chatml_and_ends_with_its_token(tmp_path):
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
  tokenizer = dataclasses.replace(load_tokenizer("bytes"), table={"<|im_end|>": 300, "<stop>": 301})
  assert stop_tokens(tokenizer, tmp_path, ["<stop>"], chat=True) == {1, 7, 9, 300, 301}
  text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  assert encode_prompt(tokenizer, "Hi", 0, chat=True, system="Be brief.") == [0, *tokenizer.encode(text)]
  for said in ({"prompt": "a<|im_end|>"}, {"prompt": "a", "system": "<|im_start|>"}):
    with pytest.raises(
      UserError, match="The conversation has <.im_.* in a message, which the vocabulary has no id for"
    ):
      encode_prompt(tokenizer, bos=None, chat=True, **said)
  with pytest.raises(UserError, match="no such token"):
    stop_tokens(tokenizer, tmp_path, ["<nope>"], chat=False)
  assert stop_tokens(load_tokenizer("bytes"), tmp_path, ["</s>", "<0x0A>", "a"], chat=False) == {1, 7, 9, 13, 100}


def test_bos_is_before_a_prompt_where_the_model_has_it_and_the_request_decides_otherwise(tiny):
  zero_first = dataclasses.replace(tiny, bos="off")
  done = [
    complete(decoder, ["ab"], Request(new_tokens=4, bos=bos))[0]
    for decoder, bos in ((tiny, "auto"), (zero_first, "on"), (zero_first, "auto"), (tiny, "off"))
  ]
  with_bos, without = (rows(tiny, [ids], 4)[0] for ids in ([0, 100, 101], [100, 101]))
  assert [one.tokens for one in done] == [with_bos, with_bos, without, without] and with_bos != without
  assert "BOS before the prompt" in summary(tiny, done[:1]) and "no BOS" in summary(tiny, done[2:])


@pytest.fixture(scope="session")
def smollm2():
  """A folder with SmolLM2-135M-Instruct in the layout of Hugging Face."""
  folder = Path(os.environ.get("TSPARSE_SMOLLM2", "-"))
  if not (folder / "tokenizer.json").exists():
    pytest.skip("set TSPARSE_SMOLLM2 to a folder with SmolLM2-135M-Instruct, of Hugging Face, for this test")
  return folder


TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def test_smollm2_goes_on_as_in_transformers_without_bos(smollm2):
  import transformers

  decoder = load(smollm2, "off")
  (done,) = complete(decoder, ["The capital of France is"], Request(new_tokens=7))
  assert done.text == " Paris.\n\nThe answer is" and not done.bos  # with BOS it goes on as "The capital of the ..."
  theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
  turns = [("system", "Be brief."), ("user", "naïve\n日本")]
  messages = [{"role": role, "content": text} for role, text in turns]
  template = TEMPLATE + "{{ '<|im_start|>assistant\n' }}"
  want = theirs.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
  assert encode_prompt(decoder.tokenizer, turns[1][1], None, chat=True, system=turns[0][1]) == want


def test_a_text_ends_where_the_context_or_the_request_does(tiny):
  done = complete(tiny, ["a" * 60, "b"], Request(new_tokens=10, stop_tokens=()))
  assert [(len(one.tokens), one.finish) for one in done] == [(3, "context"), (10, "length")]
  with pytest.raises(UserError, match="context is 64"):
    complete(tiny, ["b", "a" * 64], Request())


def test_what_cannot_be_skipped_is_said():
  dense, turbo = PRESETS["tiny"], dataclasses.replace(PRESETS["tiny"], activation="drelu")
  jumping, topk = (dataclasses.replace(turbo, **of) for of in ({"hidden_thresholds": True}, {"activation": "topk:0.8"}))
  assert [sparse_mode(config, "auto") for config in (dense, turbo, jumping, topk)] == ["off", "auto", "off", "off"]
  for config, mode, sentence in (
    (dense, "exact", "exactly zero nowhere"),
    (turbo, "predictor", "holds no predictors"),
    (turbo, "of", "unknown"),
    (jumping, "exact", "this model has hidden_thresholds, .*choose off"),
    (topk, "predictor", "has the activation topk:0.8, .*choose off"),
  ):
    with pytest.raises(UserError, match=sentence):
      sparse_mode(config, mode)


def test_auto_takes_the_mode_that_was_measured_faster(monkeypatch):
  table = {"exact": {0.0: {1: 1.1, 2: 1.2}, 0.7: {1: 0.6, 2: 1.01}}, "predictor": {0.0: {2: 1.5}, 0.5: {2: 0.5}}}
  monkeypatch.setattr("tsparse.sparse.break_even.RATIO", table)
  exact, both = ["off", "exact"], ["off", "exact", "predictor"]
  asked = [(exact, 0.69, 1), (exact, 0.7, 1), (exact, 0.99, 2), (exact, 0.7, 9), (both, 0.6, 1), (both, 0.4, 8)]
  assert [choose_mode(*one) for one in asked] == ["off", "exact", "off", "off", "predictor", "off"]


def test_auto_skips_in_the_layers_that_have_zeros_enough(tiny, monkeypatch):
  monkeypatch.setattr("tsparse.sparse.break_even.RATIO", {"exact": {0.0: {1: 1.1}, 0.95: {1: 0.5, 2: 1.1}}})
  shut, open_ = tiny.params["layers"]
  shut = shut | {"neurons": shut["neurons"]._replace(gate=0 * shut["neurons"].gate)}
  decoder = dataclasses.replace(tiny, mode="auto", params=tiny.params | {"layers": [shut, open_]})
  done = [complete(decoder, ["ab"] * rows, Request(new_tokens=3)) for rows in (1, 3)]  # 2 of 4 experts: 1 and 2 share
  skips = ("exact", "off") if decoder.kernels == "native" else ("off", "off")  # the reference reads everything
  assert [one[0].modes for one in done] == [skips, ("off", "off")]
  assert decoder.kernels != "native" or "--sparse=auto (off in 1, exact in 1 of 2 layers)" in summary(decoder, done[0])
  assert {one.text for rows in done for one in rows} == {done[0][0].text}


def test_auto_skips_only_where_that_was_measured(tiny):
  config = dataclasses.replace(tiny.config, num_experts=0, experts_per_token=0, activation="drelu")
  found = {name: choose_modes(config, name, [0.9, 0.0], 1) for name in ("native", "gpu", "tpu", "reference")}
  assert found.pop("native") == ("exact", "off") and set(found.values()) == {("off", "off")}


def test_a_terminal_says_that_it_compiles_until_text_comes():
  screen, said = Console(file=io.StringIO(), force_terminal=True), []
  with Compiling(screen) as compiling:
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    show = compiling.after(said.append)
    show("a")
    assert not said and "compiling" in screen.file.getvalue() and compiling.seconds > 0
    show("b")
    show("c")
    assert said == ["a", "b", "c"]
  took = compiling.seconds
  with Compiling(screen) as other:
    other.after(said.append)("alone")
    assert said[-1] == "c"
  jax.jit(lambda x: x + 2).lower(1.0).compile()
  assert said[-1] == "alone" and compiling.seconds == took


def test_the_command_streams_or_prints_json(shared_data):
  model = f"--model={shared_data / 'stories260k'}"
  done = run(model, "--prompt=Once upon a time", "--max_new_tokens=8", script="generate.py")
  assert done.stdout == ", there was a little girl\n" and "8 tokens" in done.stderr, done.stderr
  assert re.search(r"compiled in [1-9]\d*\.\d s\]|compiled in 0\.[1-9] s\]", done.stderr)
  done = run(model, "--prompt=Once", "--prompt=The", "--max_new_tokens=4", "--json", script="generate.py")
  fields = json.loads(done.stdout)
  assert len(done.stdout.splitlines()) == 1 and fields["compile_seconds"] > 0
  assert [len(one["tokens"]) for one in fields["completions"]] == [4, 4] and fields["sparse"] == "off"
  for arguments, sentence in (
    ([model], "--model and --prompt are needed"),
    ([model, "--prompt= "], "the prompt is empty"),
    ([model, "--prompt=a", "--sparse=exact"], "swiglu is exactly zero nowhere"),
    ([model, "--prompt=a", "--top_p=0"], "top_p is 0.0"),
    ([model, "--prompt=a", "--stop_token=<nope>"], "no such token"),
  ):
    done = run(*arguments, script="generate.py")
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
