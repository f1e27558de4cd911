"""Which runs a sweep has, and the sentences where it can have none."""

from pathlib import Path

import pytest

from tests import commands
from tests.conftest import ROOT
from tsparse import files
from tsparse.check import check
from tsparse.errors import UserError
from tsparse.sweep.runs import expand, labels, load, name_of, overrides, split, stated

CONFIG = "configs/tiny_drelu.py"


def names(sweeps, zipped=False, common=(), folder=Path("nowhere")):
  return [run.name for run in expand(CONFIG, common, sweeps, zipped, folder)]


def test_a_grid_has_all_combinations_and_zip_pairs_them():
  sweeps = ["config.activation=relu,drelu", "config.train.learning_rate=1e-3,1e-2"]
  assert names(sweeps) == [
    "activation=relu,learning_rate=0.001", "activation=relu,learning_rate=0.01",
    "activation=drelu,learning_rate=0.001", "activation=drelu,learning_rate=0.01",
  ]  # fmt: skip
  assert names(sweeps, zipped=True) == ["activation=relu,learning_rate=0.001", "activation=drelu,learning_rate=0.01"]


def test_values_have_the_types_of_the_config_and_the_runs_get_them_as_written():
  sweeps = ["config.analysis.levels=(0,0.5),(0,0.9)", "config.data.mixture='stdlib_docs:3,stdlib_code:1',''"]
  common = overrides({"data.eos": False, "train.b1": 0.8, "analysis.batch_size": 8})
  first, *_, last = expand(CONFIG, common, sweeps, False, Path("nowhere"))
  assert first.config.analysis.levels == (0, 0.5) and first.config.data.mixture == "stdlib_docs:3,stdlib_code:1"
  assert last.config.analysis.levels == (0, 0.9) and last.config.data.mixture == ""
  assert (last.config.data.eos, last.config.train.b1, last.config.analysis.batch_size) == (False, 0.8, 8)
  assert first.workdir == Path("nowhere/levels=0_0.5,mixture=stdlib_docs_3_stdlib_code_1")
  assert first.title == "levels=(0, 0.5), stdlib_docs:3,stdlib_code:1"
  *flags, workdir = first.arguments
  assert load(flags) == first.config and workdir == f"--workdir={first.workdir}"


@pytest.mark.parametrize(
  ("text", "values"),
  [
    ("a,b", ["a", "b"]),
    (" 1 , 2 ", ["1", "2"]),
    ("(0,1),[2,(3,4)],{5,6}", ["(0,1)", "[2,(3,4)]", "{5,6}"]),
    ("'a,b',\"c,'d\",e", ["a,b", "c,'d", "e"]),
    ("don't,can't", ["don't", "can't"]),
    ("''", [""]),
    ("('a,)',b),c", ["('a,)',b)", "c"]),
  ],
)
def test_commas_separate_values_but_for_those_in_brackets_and_quotes(text, values):
  assert split(text) == values


def test_names_are_short_ends_of_fields_that_tell_them_apart_and_fit_a_folder():
  assert labels(["config.train.steps", "config.seed"]) == {"config.train.steps": "steps", "config.seed": "seed"}
  assert list(labels(["config.train.steps", "config.base.train.steps"]).values()) == [
    "config.train.steps", "base.train.steps",
  ]  # fmt: skip
  long = [name_of({"config.data.train": "x" * 300 + end}) for end in "ab"]
  assert len(set(long)) == 2 and all(len(name) <= 120 for name in long)


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "there is nothing to sweep"),
    (["--sweep=config.activatoin=relu"],
     "no field 'config.activatoin'; the nearest is config.activation (now 'drelu')"),
    (["--sweep=config.train=1"], "no field 'config.train'"),
    (["--sweep=config.seed"], "write config.seed=VALUE,VALUE"),
    (["--sweep=config.data.train=a,,b"], "a value is empty"),
    (["--sweep=config.analysis.levels=(0,1"], "(0,1 has no closing )"),
    (["--sweep=config.train.steps=10,many"], "--config.train.steps=many: invalid literal for int()"),
    (["--sweep=config.seed=1", "--sweep=config.seed=2"], "config.seed is swept twice"),
    (["--sweep=config.seed=1", "--config.seed=2"], "--config.seed is swept and set for all runs"),
    (["--sweep=config.seed=1,2", "--sweep=config.activation=relu", "--zip"],
     "config.seed has 2, config.activation has 1"),
    (["--sweep=config.train.learning_rate=1e-3,0.001"], "would share the workdir"),
    (["--sweep=config.data.train='a:b',a;b"], "would share the workdir"),
    (["--sweep=config.seed=1", "--parallel=0"], "--parallel=0: at least one"),
    (["--sweep=config.seed=1", "--dry_run", "--gather"], "--dry_run and --gather exclude each other"),
    (["--sweep=config.seed=1", "--emit=slrum"], "the nearest is slurm"),
    (["--sweep=config.seed=1", "--emit=shell", "--parallel=2"], "it is for runs of this machine and for --emit=slurm"),
    (["--sweep=config.seed=1", "--emit=jobset", "--jobset=README.md"], "--jobset=README.md is no JobSet"),
  ],
)  # fmt: skip
def test_bad_input_to_a_sweep_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path):
  done = commands.run("experiments/sweep.py", f"--config={CONFIG}", f"--workdir={tmp_path}/out", *arguments)
  assert done.returncode == 2 and sentence in done.stderr, done.stderr
  assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_workdir_of_another_experiment_is_left_as_it_is(tmp_path):
  (run,) = expand(CONFIG, (), ["config.seed=1"], False, tmp_path)
  run.workdir.mkdir()
  files.write(run.workdir / "config.json", files.to_json(run.config.to_dict()))
  assert [again.state for again in expand(CONFIG, (), ["config.seed=1,2"], False, tmp_path)] == ["begun", "new"]
  with pytest.raises(UserError, match="holds another experiment"):
    expand(CONFIG, ("--config.train.steps=3",), ["config.seed=1,2"], False, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.py")), ids=lambda path: path.stem)
def test_every_ablation_is_a_sweep_of_experiments_that_can_be(path, tmp_path):
  if path.stem == "relufication":  # what the others start from
    return
  small = overrides({"model.d_ff": 64, "data.lanes": 8, "init": ""})
  runs = expand(str(path), small, stated(str(path)), False, tmp_path)
  assert len(runs) > 2 and len({run.config.to_json() for run in runs}) == len(runs)
  assert all(run.config.name == f"ablation_{path.stem}" for run in runs)
  for run in runs[:: len(runs) - 1]:
    check(run.config)
