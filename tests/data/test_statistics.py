"""experiments/data.py: what is counted, against slow oracles; what is printed, drawn and refused."""

import json
import random

import pytest

from tests import commands
from tsparse.data import overview
from tsparse.data.overlap import Overlap, read_evaluations, words_of
from tsparse.data.settings import DataSettings
from tsparse.data.statistics import statistics
from tsparse.errors import UserError


def data(*arguments):
  return commands.run("experiments/data.py", *arguments)


def write(path, texts):
  path.write_text("".join(json.dumps(t if isinstance(t, dict) else {"text": t}) + "\n" for t in texts))
  return str(path)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_items_are_found_exactly_where_their_ngrams_stand(n):
  rng = random.Random(0)

  def text(words):
    return " ".join(rng.choice("abcdefg") for _ in range(words)).replace("a b", "A, B!")

  items, texts = [text(rng.randrange(9)) for _ in range(200)], [text(rng.randrange(12)) for _ in range(20)]

  def grams(text):
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

  overlap, seen = Overlap({"set": items}, n), set()
  assert overlap.short["set"].tolist() == [len(words_of(item)) < n for item in items]
  for each in texts:
    overlap.add(each)
    seen |= grams(each)
    assert overlap.found["set"].tolist() == [bool(grams(item) & seen) for item in items]
  assert n < 5 or 0 < overlap.found["set"].sum() < 150


def test_words_that_no_item_has_break_an_ngram():
  overlap = Overlap({"set": ["one two three"]}, 3)
  overlap.add("one two and three, one two unknown")
  assert not overlap.found["set"].any()
  overlap.add("... ONE-two_three")
  assert overlap.found["set"].all()


def test_every_number_of_two_sources(tmp_path):
  a = tmp_path / "a.jsonl"
  write(a, ["same", "same", "the cat sat on the mat", "x" * 15, "é"])
  a.write_text(a.read_text() + "\n" + '{"text": ""}\nnot json\n')
  b = write(tmp_path / "b.jsonl", ["same", "y"])
  evaluations = {"cats": ["The cat sat on the mat!", "no cat", "a dog sat on the log today"]}
  settings = DataSettings(mixture=f"{a}:3,{b}:1", skip_bad=1)
  result = statistics(settings, Overlap(evaluations, 4), budget=1000)
  first, second = result["sources"]
  assert (first["documents"], first["bytes"], first["tokens"]) == (5, 4 + 4 + 22 + 15 + 2, 47 + 5)
  assert first["lengths"] == [0, 1, 2, 0, 2] and first["longest"] == 23  # tokens: 3 | 5, 5 | | 23, 16
  assert (first["copies"], first["elsewhere"], second["copies"], second["elsewhere"]) == (1, 2, 0, 1)
  assert (first["skipped"], first["malformed"], second["skipped"], second["malformed"]) == (2, 1, 0, 0)
  assert first["bytes_per_token"] == 47 / 52 and first["share"] == 52 / (52 + 7)
  assert first["epochs"] == 1000 * 0.75 / 52 and second["epochs"] == 1000 * 0.25 / 7
  assert result["evaluations"] == {"cats": {"items": 3, "short": 1, "found": 1, "share": 0.5}}
  assert (first["overlap"], second["overlap"]) == ({"cats": 1}, {"cats": 0})


def test_a_sample_is_the_same_every_time_and_its_tokens_are_scaled_up(tmp_path):
  path = write(tmp_path / "a.jsonl", [f"{i:03}" for i in range(1000)])
  held = statistics(DataSettings(train=path), Overlap({}, 13))["sources"][0]["tokens"]
  runs = [statistics(DataSettings(train=path), Overlap({}, 13), max_documents=50, budget=held * 2) for _ in range(2)]
  (row,) = runs[0]["sources"]
  assert runs[0] == runs[1] and row["measured"] == 50 < row["documents"] and row["copies"] == 0
  assert row["tokens"] == 200 and row["tokens_held"] == held and row["epochs"] == 2


def test_conversations_are_counted_with_their_template_and_searched_without(tmp_path):
  turns = {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]}
  path = write(tmp_path / "chat.jsonl", [turns])
  result = statistics(DataSettings(train=f"chat:{path}"), Overlap({"set": ["one two three", "assistant"]}, 1))
  (row,) = result["sources"]
  chatml = "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>\n"
  assert row["bytes"] == len("one two\nthree") and row["tokens"] == len(chatml) + 1
  assert row["overlap"] == {"set": 1}


def test_a_seqio_task_is_read_once_and_measured_by_its_tokens():
  from tsparse.data.tensorflow import load_tensorflow
  from tsparse.data.vocabulary import load_vocabulary

  seqio, tf = load_tensorflow()
  texts = tf.data.Dataset.from_tensor_slices(["one two", "one two", "three"])
  seqio.TaskRegistry.add(
    "counted",
    source=seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: texts, splits=["train"]),
    preprocessors=[lambda ds: ds.map(lambda t: {"targets": t}), seqio.preprocessors.tokenize,
                   seqio.preprocessors.append_eos],
    output_features={"targets": seqio.Feature(load_vocabulary("bytes"), dtype=tf.int32)},
  )  # fmt: skip
  try:
    (row,) = statistics(DataSettings(train="counted"), Overlap({"set": ["two one"]}, 1))["sources"]
    assert (row["documents"], row["bytes"], row["tokens"], row["copies"]) == (3, 19, 22, 1)
    (row,) = statistics(DataSettings(train="counted"), Overlap({}, 1), max_documents=2)["sources"]
    assert (row["documents"], row["measured"], row["epochs"]) == (None, 2, None)
    overview.tables({"sources": [row], "budget": 5, "evaluations": {}, "ngram": 1})  # unknown numbers can be shown
  finally:
    seqio.TaskRegistry.remove("counted")


def test_the_test_data_has_its_statistics_in_a_table_a_plot_and_json(shared_data, tmp_path):
  arguments = [f"--root={shared_data}", f"--vocabulary={shared_data}/stories260k/tokenizer.model", "--tokens=1000000"]
  arguments += [f"--evals={shared_data}/evals", "--ngram=8", "--max_documents=40", f"--out={tmp_path}/out"]
  done = data("--mixture=stories_mixture", *arguments, "stats")
  assert done.returncode == 0, done.stderr
  assert "too short" in done.stdout and "epochs" in done.stdout and "40 of" in done.stdout
  result = json.loads((tmp_path / "out" / "statistics.json").read_text())
  assert [row["measured"] for row in result["sources"]] == [40, 1, 40, 40, 40, 40]
  assert set(result["evaluations"]) == {"arc_challenge", "arc_easy", "openbookqa", "piqa"}
  assert all(sum(row["lengths"]) == row["measured"] for row in result["sources"])
  assert (tmp_path / "out" / "statistics.png").read_bytes().startswith(b"\x89PNG")


def test_the_list_says_what_is_there_and_how_to_get_the_rest(tmp_path):
  (tmp_path / "dolma_pes2o").mkdir()
  done = data("--mixture=turbosparse_150b", f"--root={tmp_path}", "list")
  lines = " ".join(done.stdout.split())
  assert "dolma_pes2o academic 7.83% found" in lines and "github_code code 1.41% missing" in lines
  assert "1 of 15 sources found" in lines and "tfds build pg19" in lines and done.returncode == 0
  done = data("--mixture=stdlib_docs:3,nowhere.jsonl:1", "list")
  assert "75.00%" in done.stdout and "25.00% missing" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["stats"], "--mixture is missing"),
    (["--mixture=stdlib"], "nothing is not one of list, stats"),
    (["--mixture=stdlib", "count"], "count is not one of list, stats"),
    (["--mixture=stdlb", "stats"], "did you mean 'stdlib'"),
    (["--mixture=stdlb", "list"], "did you mean 'stdlib'"),
    (["--mixture=stdlib:0", "list"], "add up to 0"),
    (["--mixture=turbosparse_150b", "stats"], "15 of 15 sources are missing"),
    (["--mixture={bad}", "stats"], "a.jsonl:2 is not JSON"),
    (["--mixture=stdlib_docs", "stats", "--ngram=0"], "--ngram=0: an n-gram has"),
    (["--mixture=stdlib_docs", "stats", "--max_documents=0"], "--max_documents=0"),
    (["--mixture=stdlib_docs", "stats", "--evals=README.md"], "no .jsonl file"),
    (["--mixture=stdlib_docs", "stats", "--evals={bad}"], "a.jsonl:2 is no evaluation item"),
    (["--mixture=stdlib_docs", "stats", "--vocabulary=nowhere.model"], "'nowhere.model' cannot be read"),
  ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(arguments, sentence, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"query": 1}x\n')
  filled = [argument.format(bad=tmp_path / "a.jsonl") for argument in arguments]
  done = data(*filled, f"--out={tmp_path}/out")
  assert done.returncode == 2 and sentence in done.stderr, done.stderr
  assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
  "item", [{"query": "q"}, {"query": "q", "choices": ["a"], "gold": 1}, {"text": 3}, ["q"], {"choices": [], "gold": 0}]
)
def test_an_evaluation_item_of_another_form_is_refused_with_its_line(item, tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(item) + "\n")
  with pytest.raises(UserError, match=r"a.jsonl:2 "):
    read_evaluations([str(tmp_path)])
