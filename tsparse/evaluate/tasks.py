"""What is asked of a model: tasks of lm-eval by name, suites of them with their shots, and files of questions."""

import contextlib
import dataclasses
import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsparse.errors import UserError


class Part(NamedTuple):
  """A task of a suite, its shots, and which of its metrics the suite reports."""

  task: str
  shots: int
  metric: str


# Turbo Sparse (arXiv 2406.05955) states the tasks of all three and the shots of the first; metrics are the Open LLM
# Leaderboard's where it has the task, else accuracy as most papers print it.
SUITES = {
  "openllm": (  # section 6, Table 6
    Part("arc_challenge", 25, "acc_norm"),
    Part("hellaswag", 10, "acc_norm"),
    Part("mmlu", 5, "acc"),
    Part("truthfulqa_mc2", 0, "acc"),
    Part("winogrande", 5, "acc"),
    Part("gsm8k", 8, "exact_match,strict-match"),
  ),
  "commonsense": (  # section 6, Tables 6 and 13
    Part("piqa", 0, "acc"),
    Part("sciq", 0, "acc"),
    Part("arc_easy", 0, "acc"),
    Part("openbookqa", 0, "acc_norm"),
  ),
  "section4": (  # accuracy against sparsity, Figure 5a
    Part("winogrande", 0, "acc"),
    Part("truthfulqa_mc2", 0, "acc"),
    Part("piqa", 0, "acc"),
    Part("lambada_openai", 0, "acc"),
    Part("arc_easy", 0, "acc"),
    Part("arc_challenge", 0, "acc_norm"),
  ),
}
FEWSHOT_SEED = 1234  # lm-eval's
FILES = (".jsonl", ".yaml", ".yml")
KINDS = 'lines of {"query", "choices", "gold"} or of {"text"}'
CHOICES = {
  "output_type": "multiple_choice",
  "fewshot_split": "test",
  "doc_to_text": "Question: {{query}}\nAnswer:",  # as lm-eval's own ARC and PIQA
  "doc_to_choice": "choices",
  "doc_to_target": "gold",
  "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
TEXT = {
  "output_type": "loglikelihood_rolling",
  "doc_to_text": "",
  "doc_to_target": "text",
  "metric_list": [
    {"metric": name, "aggregation": aggregation, "higher_is_better": False}
    for name, aggregation in (
      ("word_perplexity", "weighted_perplexity"),
      ("byte_perplexity", "weighted_perplexity"),
      ("bits_per_byte", "bits_per_byte"),
    )
  ],
}  # fmt: skip


@dataclasses.dataclass
class Loaded:
  """Tasks ready to be asked.

  Attributes:
    tasks: name -> lm-eval's Task.
    groups: name -> lm-eval's Group, of those that average their tasks.
    shown: (task or group, metric of lm-eval's results or "" for all of them), in the order they were asked for.
    suites: name -> its parts, of those asked for.
  """

  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)
  groups: dict[str, Any] = dataclasses.field(default_factory=dict)
  shown: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  suites: dict[str, tuple[Part, ...]] = dataclasses.field(default_factory=dict)

  def for_harness(self) -> dict[str, Any]:
    """What `lm_eval.evaluator.evaluate` takes; the few-shot examples are drawn as at the first time."""
    for task in self.tasks.values():
      task.set_fewshot_seed(FEWSHOT_SEED)
    return {
      "tasks": self.tasks,
      "groups": self.groups,
      "group_map": {name: group.child_names for name, group in self.groups.items()},
    }


def load(asked: Sequence[str], data: Path | None = None) -> Loaded:
  """The tasks of `--tasks`: names of lm-eval or of SUITES, `.jsonl` and `.yaml` files, each with `:SHOTS` or without.

  Args:
    asked: those.
    data: a folder with copies of the data sets of the Hub, `ORGANISATION/NAME` each.

  Raises:
    UserError: one is unknown, given twice, malformed, or its data is not there.
  """
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of its retries
  if data is not None and not data.is_dir():
    raise UserError(f"--data={data} is no folder: give the one that holds copies of data sets.")
  loaded, wanted = Loaded(), []
  for text in asked:
    name, shots = _split(text)
    if name not in SUITES:
      wanted.append((name, shots, ""))
      continue
    if shots is not None:
      raise UserError(f"--tasks={text}: the suite {name} has shots of its own; name its tasks one by one for others.")
    loaded.suites[name] = SUITES[name]
    wanted += SUITES[name]
  manager = _manager([name for name, *_ in wanted])
  _check_names(wanted, manager)
  for name, shots, metric in wanted:
    found = {name: _from_lines(Path(name))} if name.endswith(".jsonl") else None
    tasks, groups = (found, {}) if found else _from_harness(name, [name for name, *_ in wanted], manager, data)
    tasks = {task.task_name: _with_shots(task, shots) for task in tasks.values()}
    for twice in sorted(set(tasks) & set(loaded.tasks)):
      shown = [task.config.num_fewshot for task in (loaded.tasks[twice], tasks[twice])]
      if name.endswith(FILES) or shown[0] != shown[1]:
        what = "from two files" if shown[0] == shown[1] else f"with {shown[0]} and with {shown[1]} shots"
        raise UserError(f"--tasks={','.join(asked)} asks {twice} {what}: do so in two commands, or rename a file.")
    loaded.tasks, loaded.groups = tasks | loaded.tasks, groups | loaded.groups
    whole = name in groups and groups[name].has_aggregation
    loaded.shown += [line for key in ([name] if whole else tasks) if (line := (key, metric)) not in loaded.shown]
  return loaded


def _split(text: str) -> tuple[str, int | None]:
  """ "arc_easy:25" -> ("arc_easy", 25); without a number None, the shots of the task itself."""
  name, colon, shots = text.rpartition(":")
  if not colon:
    return text, None
  if not shots.isdecimal():
    raise UserError(f"--tasks={text}: {shots!r} is no number of shots, as in arc_challenge:25.")
  return name, int(shots)


def _manager(names: Sequence[str]):
  """lm-eval's index of tasks; without its own 14,000 files, which take seconds to read, where none is asked for."""
  from lm_eval.tasks import TaskManager

  files = [Path(name) for name in names if name.endswith(FILES)]
  grouped = any(file.suffix != ".jsonl" and file.is_file() and "group:" in file.read_text() for file in files)
  return TaskManager(include_defaults=grouped or len(files) < len(names))


def _check_names(wanted: Sequence[tuple[str, int | None, str]], manager) -> None:
  for name, *_ in wanted:
    if name.endswith(FILES):
      if not Path(name).is_file():
        raise UserError(f"--tasks={name}: there is no such file.")
    elif name not in manager.task_index:
      nearest = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], n=3)
      hint = f"the nearest are {', '.join(nearest)}" if nearest else f"suites are {', '.join(SUITES)}"
      raise UserError(
        f"--tasks={name} is unknown to lm-eval; {hint}. A file of questions ends in {' or '.join(FILES[:2])}."
      )


def _from_harness(name: str, names: Sequence[str], manager, data: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
  """Tasks and groups of a name or a YAML file, one of the `names` that are asked for, with their data."""
  name = str(Path(name).resolve()) if name.endswith(FILES) else name
  # A path such as allenai/ai2_arc means a folder below the current one to `datasets`, before it asks the Hub.
  where = contextlib.chdir(data) if data is not None and not name.endswith(FILES) else contextlib.nullcontext()
  try:
    with where:
      found = manager.load(name)
  except ImportError as error:
    raise UserError(f"task {name} needs a package that is not installed ({error}): install it by pip.") from None
  except Exception as error:  # of lm-eval, of data sets, of templates and of functions in a YAML: anything
    raise UserError(_why(name, names, manager, error)) from None
  for task in found["tasks"].values():
    if getattr(task, "UNSAFE_CODE", False):
      raise UserError(f"task {task.task_name} runs the code that a model writes, which is refused: leave it out.")
    if getattr(task, "MULTIMODAL", False):
      raise UserError(f"task {task.task_name} shows images or sounds, and the model reads text: leave it out.")
  return found["tasks"], found["groups"]


def _why(name: str, names: Sequence[str], manager, error: Exception) -> str:
  """What is wrong with a name, and where all the data of `names` comes from if it is that."""
  reason = next(iter(str(error).splitlines()), "") or type(error).__name__
  if name.endswith(FILES):
    return f"--tasks={name} is no task that lm-eval can read ({type(error).__name__}: {reason}): mend it."
  sets = sorted(_data_sets(name, manager.task_index))
  if not sets:
    return f"task {name} cannot be read ({type(error).__name__}: {reason})."
  every = sorted(set().union(*(_data_sets(each, manager.task_index) for each in names)))
  return (
    f"the data of task {name} ({', '.join(sets)}) is not on this machine and cannot be fetched ({reason}): where there "
    f"is a network, run `hf download --repo-type=dataset X --local-dir=DATA/X` for X = {', '.join(every)}, and give "
    "that folder DATA here as --data=DATA."
  )


def _data_sets(name: str, index: Mapping[str, Any]) -> set[str]:
  """Paths of the data sets of a task, or of those of a group or tag."""
  entry = index.get(name)
  if entry is None:
    return set()
  config = entry.cfg or {}
  members = [*entry.tags] if not config else config["task"] if isinstance(config.get("task"), list) else []
  names = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in members]
  own = {config["dataset_path"]} if "dataset_path" in config else set()
  return own.union(*(_data_sets(member, index) for member in names if isinstance(member, str) and member != name))


def _with_shots(task: Any, shots: int | None) -> Any:
  """The task with so many worked examples before each question; None for its own number, or none."""
  own = task.config.num_fewshot
  if shots and own == 0:
    raise UserError(f"task {task.task_name} fixes its shots at 0: leave out :{shots}.")
  task.set_config("num_fewshot", (own or 0) if shots is None else shots)
  sampler = getattr(task, "sampler", None)
  others = len(sampler.df) - (task.fewshot_cfg.split == task.config.test_split) if sampler else 0
  if task.config.num_fewshot > others:
    raise UserError(f"task {task.task_name} has {others} examples to show and {shots} shots are asked: ask for fewer.")
  return task


def _from_lines(path: Path) -> Any:
  """A task of a `.jsonl` file: multiple choice, or the perplexity of texts."""
  import datasets
  from lm_eval.api.task import ConfigurableTask

  rows = []
  with path.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        try:
          rows.append(_checked(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError, UnicodeDecodeError) as error:
          raise UserError(f"{path}, line {number} is no question ({error}): a file has {KINDS}.") from None
  kinds = {tuple(sorted(row)) for row in rows}
  if len(kinds) != 1:
    what = "mixes two kinds of lines" if kinds else "is empty"
    raise UserError(f"{path} {what}: a file has {KINDS}.")

  class Lines(ConfigurableTask):
    def download(self, *_, **__):
      self.dataset = {"test": datasets.Dataset.from_list(rows)}

  config = TEXT if "text" in rows[0] else CHOICES
  config = {"task": path.stem, "dataset_path": str(path), "test_split": "test", "metadata": {"version": 1}} | config
  return Lines(config=json.loads(json.dumps(config)))  # lm-eval changes it


def _checked(row: Any) -> dict[str, Any]:
  """The fields of a line that count; ValueError or the like says what is wrong with it."""
  if not isinstance(row, dict):
    raise TypeError("not a JSON object")
  if "choices" not in row and isinstance(row.get("text"), str):
    return {"text": row["text"]}
  query, choices, gold = row["query"], row["choices"], row["gold"]
  if not isinstance(query, str) or not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
    raise TypeError("query is not text, or choices not a list of texts")
  if len(choices) < 2 or isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
    raise ValueError(f"gold {gold} of {len(choices)} choices")
  return {"query": query, "choices": choices, "gold": gold}
