"""What `--tasks` and `--sparse` take and refuse: suites, files, data of the Hub on disk or not."""

import json
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
from rich.console import Console

from tests import commands
from tests.sparse.test_predictors import model_of, store
from tsparse.errors import UserError
from tsparse.evaluate import tasks
from tsparse.evaluate.interventions import Setting, parse
from tsparse.evaluate.report import suite_means
from tsparse.evaluate.run import _load_lm_eval, run
from tsparse.evaluate.scores import NARROWEST, Row, arrays, batched, width

FOLDERS = (
  "arc",
  "gsm8k",
  "hellaswag",
  "lambada",
  "mmlu/default",
  "openbookqa",
  "piqa",
  "sciq",
  "truthfulqa",
  "winogrande",
)
QUESTION = {"query": "The sky is", "choices": ["blue", "a fish"], "gold": 0}


@pytest.fixture(scope="module", autouse=True)
def index():
  """lm-eval's index of those folders alone: all of them take 6 seconds to read."""
  root = Path(lm_eval.tasks.__file__).parent
  manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in FOLDERS])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, "_manager", lambda names: manager)
    yield manager


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model") / "model"
  store(folder, *model_of("moe")[:2])
  return folder


def save(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_suites_are_of_tasks_that_lm_eval_has_and_their_scores_are_averaged(index):
  assert {part.task for suite in tasks.SUITES.values() for part in suite} <= set(index.all_tasks)
  assert [(part.task, part.shots) for part in tasks.SUITES["openllm"]] == [
    ("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0), ("winogrande", 5), ("gsm8k", 8),
  ]  # fmt: skip
  rows = [{"task": "gsm8k", "metric": "exact_match (strict-match)", "values": [0.5, 0.25]}]
  rows += [
    {"task": "arc_easy", "metric": metric, "values": values} for metric, values in (("acc", [1.0, 0.5]), ("f", [9]))
  ]
  parts = [tasks.SUITES["openllm"][-1], tasks.Part("arc_easy", 0, "acc")]
  assert suite_means(rows, {"both": parts}) == {"both": [0.75, 0.375]}


def test_a_copy_of_a_data_set_of_the_hub_is_read_from_the_folder_of_data(tmp_path, shared_data, monkeypatch):
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
  folder = tmp_path / "data" / "allenai" / "ai2_arc"
  folder.mkdir(parents=True)
  config = "configs:\n- config_name: ARC-Easy\n  data_files:\n"
  splits = ("train", "validation", "test")
  (folder / "README.md").write_text(
    f"---\n{config}{''.join(f'  - {{split: {s}, path: {s}.jsonl}}' + chr(10) for s in splits)}---\n"
  )
  lines = (shared_data / "evals" / "arc_easy.jsonl").read_text().splitlines()[:30]
  for start, split in enumerate(splits):
    rows = [
      {
        "question": row["query"],
        "choices": {"text": row["choices"], "label": list("ABCDE")[: len(row["choices"])]},
        "answerKey": "ABCDE"[row["gold"]],
      }
      for row in map(json.loads, lines[10 * start : 10 * start + 10])
    ]
    save(folder / f"{split}.jsonl", rows)
  loaded = tasks.load(["arc_easy:3"], tmp_path / "data")
  save(tmp_path / "same.jsonl", map(json.loads, lines[20:]))
  ours = tasks.load([f"{tmp_path}/same.jsonl"])
  assert loaded.tasks["arc_easy"].config.num_fewshot == 3 and loaded.shown == [("arc_easy", "")]
  for task in (loaded.for_harness()["tasks"]["arc_easy"], ours.for_harness()["tasks"]["same"]):
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
  # a file of questions is asked as lm-eval asks ARC
  assert [i.args for i in loaded.tasks["arc_easy"].instances] == [i.args for i in ours.tasks["same"].instances]


@pytest.mark.parametrize(
  ("asked", "sentence"),
  [
    (["arc_eazy"], "arc_eazy is unknown to lm-eval; the nearest are arc_easy"),
    (["openlm"], "the nearest are openllm"),
    (["xyzzy"], "suites are openllm, commonsense, section4"),
    (["openllm:5"], "the suite openllm has shots of its own"),
    (["arc_easy:few"], "'few' is no number of shots"),
    (["arc_easy"], r"data of task arc_easy \(allenai/ai2_arc\) is not on this .*DATA/X` for X = allenai/ai2_arc, and"),
    (["mmlu", "gsm8k"], r"data of task mmlu \(cais/mmlu\) is not on .* for X = cais/mmlu, openai/gsm8k, and give"),
    (["{tmp}/none.jsonl"], "there is no such file"),
    (["{tmp}/empty.jsonl"], "is empty: a file has lines of"),
    (["{tmp}/bad.jsonl"], "line 2 is no question"),
    (["{tmp}/gold.jsonl"], "line 1 is no question .gold 2 of 2 choices"),
    (["{tmp}/mixed.jsonl"], "mixes two kinds of lines"),
    (["{tmp}/good.jsonl:4"], "has 3 examples to show and 4 shots are asked"),
    (["{tmp}/good.jsonl:1", "{tmp}/good.jsonl:2"], "with 1 and with 2 shots"),
    (["{tmp}/good.jsonl", "{tmp}/good.jsonl"], "asks good from two files"),
    (["{tmp}/bad.yaml"], "is no task that lm-eval can read"),
    (["{tmp}/fixed.yaml:2"], "fixes its shots at 0"),
  ],
)  # fmt: skip
def test_tasks_that_cannot_be_asked_are_a_sentence(asked, sentence, tmp_path):
  save(tmp_path / "good.jsonl", [QUESTION] * 4)
  (tmp_path / "empty.jsonl").write_text("\n")
  save(tmp_path / "bad.jsonl", [QUESTION, {"query": "What?"}])
  save(tmp_path / "gold.jsonl", [QUESTION | {"gold": 2}])
  save(tmp_path / "mixed.jsonl", [QUESTION, {"text": "The sky is blue."}])
  (tmp_path / "bad.yaml").write_text("task: x\noutput_type: poem\n")
  yaml = f"task: fixed\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/good.jsonl}}}}\n"
  (tmp_path / "fixed.yaml").write_text(f"{yaml}test_split: test\ndoc_to_text: q\ndoc_to_target: gold\nnum_fewshot: 0\n")
  with pytest.raises(UserError, match=sentence) as caught:
    tasks.load([text.format(tmp=tmp_path) for text in asked])
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"model": "nowhere"}, "nowhere holds no model"),
    ({"out": "{tmp}"}, "is in use"),
    ({"sparse": ["topk"]}, "'' is no level of topk"),
    ({"sparse": ["top:0.5"]}, "--sparse=top:0.5 is unknown, the nearest is topk"),
    ({"sparse": ["topk:0.5", "1"]}, "'1' is no level of topk, which is a share of zeros"),
    ({"sparse": ["threshold:-1"]}, "is no level of threshold"),
    ({"sparse": ["off:1"]}, "--sparse=off:1 is unknown"),
    ({"sparse": ["topk:0.5", "exat"]}, "--sparse=exat is unknown, the nearest is exact"),
    ({"sparse": ["topk:0.5", "topk:0.50"]}, "topk:0.5 is given twice"),
    ({"sparse": ["predictor"]}, "the model holds no predictors"),
    ({"predictors": Path("x")}, "is for --sparse=predictor"),
    ({"mask_shared": True}, "has no shared experts"),
    ({"max_length": 513}, "the model is made for 512 tokens, give 2 to 512"),
    ({"batch_size": 12}, "use a multiple of 8"),
    ({"data": Path("nowhere")}, "--data=nowhere is no folder"),
    ({"tasks": ["{tmp}/long.jsonl"], "max_length": 8}, "is 28 tokens and must be 1 to 8, the model's context: leave"),
    ({"tasks": ["{tmp}/write.yaml"], "max_length": 8}, "task write generates up to 256 tokens and the context is 8"),
    ({"tasks": ["{tmp}/write.yaml"]}, "task write asks for generation_kwargs num_beams"),
  ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_a_sentence_and_nothing_is_written(changes, sentence, model, tmp_path, monkeypatch):
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / "cache")
  save(tmp_path / "long.jsonl", [QUESTION | {"choices": ["blue", "a long answer to a question"]}])
  yaml = f"task: write\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/long.jsonl}}}}\n"
  yaml += "test_split: test\noutput_type: generate_until\ndoc_to_text: query\ndoc_to_target: query\n"
  beams = "" if "max_length" in changes else ", num_beams: 4"
  (tmp_path / "write.yaml").write_text(f"{yaml}generation_kwargs: {{until: [x], do_sample: false{beams}}}\n")
  arguments = {"model": model, "tasks": ["{tmp}/long.jsonl"], "out": "{tmp}/out"} | changes
  arguments["tasks"] = [text.format(tmp=tmp_path) for text in arguments["tasks"]]
  arguments["out"] = Path(arguments["out"].format(tmp=tmp_path))
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match=sentence):
    run(Path(arguments.pop("model")), **arguments, console=Console(quiet=True))
  assert sorted(tmp_path.rglob("*")) == before


def test_without_lm_eval_a_sentence_says_how_to_install_it(model, tmp_path, monkeypatch):
  _load_lm_eval.cache_clear()
  monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
  with pytest.raises(UserError, match="lm-eval is not installed .*pip install -r requirements-eval.txt"):
    run(model, ["questions.jsonl"], tmp_path / "out", console=Console(quiet=True))


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--model=nowhere"], "--model, --tasks and --out are needed"),
    (["--model=nowhere", "--tasks=sciq", "--out=x", "--limit=0"], "--limit=0"),
    (["--model=nowhere", "--tasks=sciq", "--out=x"], "nowhere holds no model"),
  ],
)
def test_bad_input_to_the_command_is_one_sentence_and_exit_code_2(arguments, sentence):
  done = commands.run("experiments/evaluate.py", *arguments)
  assert done.returncode == 2 and sentence in done.stderr and done.stderr.startswith("error: ")
  assert len(done.stderr.strip().splitlines()) == 1


def test_settings_are_read_in_their_order():
  assert parse(["topk:0", "0.5", "off", "threshold:1e-2"]) == [
    Setting("topk", 0.0), Setting("topk", 0.5), Setting("off"), Setting("threshold", 0.01),
  ]  # fmt: skip
  assert [setting.name for setting in parse(["topk:0.85", "exact"])] == ["topk:0.85", "exact"]


def test_rows_of_one_width_are_batched_and_nothing_is_lost():
  rows = [Row(tuple(range(length)), 2) for length in (3, 40, 70, 33, 90, 64, 120, 49)]
  batches = list(batched(rows, 2))
  assert sorted(i for batch in batches for i in batch) == list(range(8))
  assert all(len({width(len(rows[i].tokens)) for i in batch}) == 1 for batch in batches)
  assert [width(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 513)] == [NARROWEST, 32, 48, 48, 64, 64, 96, 128, 768]
  made = arrays([Row((5, 6, 7), 2)], 2)
  assert made["inputs"][0, :4].tolist() == [5, 6, 7, 0] and made["targets"][0, :4].tolist() == [6, 7, 0, 0]
  assert made["scored"].sum() == made["scored"][0, 1] == 1 and made["segment_ids"].sum() == 3
