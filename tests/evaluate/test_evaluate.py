"""`experiments/evaluate.py`: lm-eval's tasks on our models, against lm-eval's own transformers backend."""

import dataclasses
import functools
import io
import json
import shutil

import jax
import numpy as np
import pytest
from lm_eval.utils import make_table
from rich.console import Console

from tests.convert.test_huggingface import parameters, save_huggingface
from tests.data.test_vocabulary import published_json
from tests.sparse.test_predictors import RANKS, model_of, store, weights_of
from tsparse import files
from tsparse.convert.convert import convert
from tsparse.convert.model import open_model
from tsparse.evaluate.interventions import Setting, intervention
from tsparse.evaluate.run import run
from tsparse.evaluate.scores import Row, scores
from tsparse.evaluate.tasks import load
from tsparse.models.transformer import Transformer
from tsparse.sharding import MESH_AXES, make_mesh
from tsparse.sparse.decode import by_layer
from tsparse.sparse.generate import decoder_of, stream
from tsparse.sparse.predictors import stored

QUESTION = {"query": "The sky is", "choices": ["blue", "a fish"], "gold": 0}
LENGTH = 128  # of the context, which some questions with their shots exceed
GENERATION = """
task: continue
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "."
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
  """What `datasets` caches goes to a folder of the tests, and torch takes one thread: for such models the quickest."""
  import torch

  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
  torch.set_num_threads(threads)


def save_tokenizer(shared_data, folder):
  published_json(shared_data / "stories260k" / "tokenizer.model").save(str(folder / "tokenizer.json"))
  ends = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
  (folder / "tokenizer_config.json").write_text(json.dumps(ends))


def asked(shared_data, folder):
  """What is asked of --tasks: three files, of a few questions, of texts longer than the context and of beginnings."""
  lines = (shared_data / "evals" / "openbookqa.jsonl").read_text().splitlines()[:12]
  (folder / "questions.jsonl").write_text("\n".join(lines))
  stories = (shared_data / "tinystories" / "valid_v2.jsonl").read_text().splitlines()[:3]
  (folder / "stories.jsonl").write_text("\n".join(stories))
  starts = [json.dumps({"text": json.loads(line)["text"][: 40 * i]}) for i, line in enumerate(stories, 1)]
  starts.append(json.dumps({"text": "Once upon a time " * 20}))
  (folder / "starts.jsonl").write_text("\n".join(starts))
  (folder / "continue.yaml").write_text(GENERATION.format(file=folder / "starts.jsonl"))
  return [f"{folder}/questions.jsonl:2", f"{folder}/stories.jsonl", f"{folder}/continue.yaml"]


def mask_largest(module, inputs, share):
  """Turbo Sparse eq. 3-4 before a down projection, in torch."""
  size = inputs[0].abs()
  kept = size.shape[-1] - round(share * size.shape[-1])
  return (inputs[0] * (size >= size.topk(kept).values[..., -1:]),)


def by_transformers(folder, tasks, share=None):
  """lm-eval's results by its own backend, all but a share of the hidden masked."""
  from lm_eval.evaluator import evaluate
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=16, max_length=LENGTH)
  if share:
    for layer in theirs.model.model.layers:
      layer.mlp.down_proj.register_forward_pre_hook(functools.partial(mask_largest, share=share))
  return evaluate(theirs, load(tasks).for_harness(), bootstrap_iters=100, log_samples=True)


def read_samples(out, setting, task):
  return [json.loads(line) for line in (out / f"samples_{setting}_{task}.jsonl").read_text().splitlines()]


def numbers(answers):
  """Log-likelihoods, whether they are the likeliest, or texts, of answers as lm-eval keeps them."""
  return [list(answer) if isinstance(answer, tuple) else answer for answer in answers]


def assert_equal(out, setting, want, masked=False):
  """That questions have the same log-likelihoods and texts, and tasks the same scores and errors.

  Of two nearly equal entries of the hidden a mask keeps one, here another than there now and then, by the rounding of
  the CPU: it moves the few answers that saw it, by little; a long text's, which is a sum over its tokens, by more.
  """
  away, size = [], []
  results = json.loads((out / f"results_{setting}.json").read_text())
  assert set(want) - {"samples"} <= set(results) and set(want["results"]) == set(results["results"])
  assert "±" in make_table(results)  # lm-eval reads it as its own
  for task, found in want["results"].items():
    for metric, score in found.items():
      near = score if isinstance(score, str) or "acc" in metric or "match" in metric else pytest.approx(score, 1e-3)
      assert results["results"][task][metric] == near, metric
    for ours, theirs in zip(read_samples(out, setting, task), want["samples"][task], strict=True):
      for answer, other in zip(ours["filtered_resps"], numbers(theirs["filtered_resps"]), strict=True):
        if isinstance(other, str):
          assert answer == other
        else:
          (ours_is, *greedy), (theirs_is, *likeliest) = np.atleast_1d(answer), np.atleast_1d(other)
          assert greedy == likeliest
          away.append(abs(ours_is - theirs_is))
          size.append(abs(theirs_is))
  away, near = np.array(away), np.maximum(1e-2, 1e-3 * np.array(size))
  assert (away < 1e-3).mean() > 0.9 and (away < near).all() if masked else (away < 1e-3).all()


def test_a_real_model_answers_as_by_transformers_whole_and_masked(shared_data, tmp_path):
  shutil.copytree(shared_data / "stories260k", tmp_path / "model", ignore=lambda *_: ["tokenizer.model"])
  save_tokenizer(shared_data, tmp_path / "model")
  tasks, out, console = asked(shared_data, tmp_path), tmp_path / "out", Console(file=io.StringIO(), width=100)
  sparse = ["off", "topk:0.5"]
  made = run(tmp_path / "model", tasks, out, sparse=sparse, max_length=LENGTH, samples=True, console=console)
  for name, share in (("off", None), ("topk_0.5", 0.5)):
    assert_equal(out, name, by_transformers(tmp_path / "model", tasks, share), masked=share is not None)
  assert json.loads((out / "evaluation.json").read_text()) == files.strict(made)
  off, masked = made["settings"]
  # silu(gate) * up of this model is exactly 0 where a sum in gate or up cancels: 4 of 141 million entries
  assert off["zero_fraction"] < 1e-6 and masked["zero_fraction"] == pytest.approx(0.5)
  said, cut = console.file.getvalue(), off["truncated"]
  assert f"warning: {cut['requests']} requests were longer than the context of 128 tokens" in said
  row = next(row for row in made["scores"] if row["metric"] == "acc_norm")
  assert f"{row['values'][1]:.4f} ± {row['stderr'][1]:.4f}" in said and "± 0.1" in (out / "scores.csv").read_text()
  assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_experts_of_a_model_of_ours_answer_as_their_export_does_and_write_what_they_find_likeliest(
  shared_data, tmp_path
):
  fields = {"vocab_size": 512, "num_local_experts": 4, "max_position_embeddings": LENGTH}
  save_huggingface(tmp_path / "first", "Mixtral", fields)
  save_tokenizer(shared_data, tmp_path / "first")
  model = convert(tmp_path / "first", tmp_path / "ours", "tsparse")
  convert(tmp_path / "ours", tmp_path / "export", "hf")
  tasks, out = asked(shared_data, tmp_path), tmp_path / "out"
  assert run(tmp_path / "ours", tasks, out, samples=True, console=Console(quiet=True))["bos"]  # the post-processor's
  assert_equal(out, "off", by_transformers(tmp_path / "export", tasks))

  plain, masks = (intervention(Setting("topk", level), model.config, shared=False) for level in (0, 0.75))
  decoder = dataclasses.replace(decoder_of(model, "off"), kernels="reference")
  prompts = np.random.default_rng(0).integers(3, 512, (4, 15)).tolist()
  whole, masked = (
    np.stack(list(stream(dataclasses.replace(decoder, interventions=by), prompts, 12)), axis=1).tolist()
    for by in (by_layer(model.config, each) for each in (plain, masks))
  )
  assert whole != masked
  mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
  rows = [Row((*prompt, *tokens[:-1]), len(tokens)) for prompt, tokens in zip(prompts, masked, strict=True)]
  (found,) = scores(Transformer(model.config), parameters(model), mesh, rows, 4, masks)
  for index, likeliest in zip(*found[:2], strict=True):
    assert likeliest.greedy and likeliest.last.argmax() == masked[index][-1]


def test_predictors_mask_what_is_scored_and_exact_skips_only_zeros(tmp_path):
  config, params, _ = model_of("moe")
  store(tmp_path / "model", config, params)
  model, weights = open_model(tmp_path / "model"), weights_of(config)
  (tmp_path / "model" / "predictors").mkdir()
  weights["threshold"] = np.where(np.eye(2, 4), -np.inf, 0.5).astype(np.float32)  # some experts whole
  wide = stored.with_predictors(config, RANKS, "after_norm")
  stored.save(tmp_path / "model" / "predictors", model, wide, weights, {"recall": 0.9, "read": {}})
  (questions := tmp_path / "questions.jsonl").write_text(json.dumps(QUESTION))
  out, sparse = tmp_path / "out", ["exact", "predictor"]
  made = run(tmp_path / "model", [str(questions)], out, sparse=sparse, samples=True, console=Console(quiet=True))
  natural, masked = (setting["zero_fraction"] for setting in made["settings"])
  assert 0.3 < natural < 0.8 and natural + 0.1 < masked < 1
  merged = stored.merge(model, stored.load(tmp_path / "model" / "predictors", model))
  exact, sample = (read_samples(out, setting, "questions")[0] for setting in sparse)
  assert exact["filtered_resps"] != sample["filtered_resps"]
  tokens, answers = np.zeros((2, 48), np.int32), [f" {text}".encode() for text in QUESTION["choices"]]
  front = b"Question: The sky is\nAnswer:"
  for row, answer in zip(tokens, answers, strict=True):
    row[1 : 1 + len(front + answer)] = np.frombuffer(front + answer, np.uint8) + 3  # the byte vocabulary; BOS is 0
  inputs = tokens, np.ones_like(tokens), np.broadcast_to(np.arange(48), tokens.shape)
  logits = jax.jit(Transformer(merged.config).apply)({"params": parameters(merged)}, *inputs)[0]
  found = np.asarray(jax.nn.log_softmax(logits))[:, len(front) :]
  for row, answer, (log_p, greedy) in zip(found, answers, sample["filtered_resps"], strict=True):
    ids = np.frombuffer(answer, np.uint8) + 3
    assert log_p == pytest.approx(row[np.arange(len(ids)), ids].sum(), abs=1e-4)
    assert greedy == (row[: len(ids)].argmax(-1) == ids).all()
