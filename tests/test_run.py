"""`experiments/run.py` as a user types it."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import commands
from tests.conftest import ENVIRONMENT, ROOT

CONFIGS = sorted(
  path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("default", "repeat", "relufy")
)
SMALL = [
  "--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.d_ff=64", "--config.model.head_dim=8",
  "--config.train.seq_len=64", "--config.train.batch_size=4", "--config.data.lanes=4", "--config.train.warmup_steps=5",
  "--config.train.log_every=1", "--config.train.checkpoint_every=4", "--config.analysis.tokens=2000",
]  # fmt: skip


def run(*arguments, script="run.py", env=ENVIRONMENT):
  return commands.run(f"experiments/{script}", *arguments, env=env)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "experiments").glob("*.py")))
def test_help_is_quick_and_imports_nothing_heavy(script):
  probe = f"import runpy, sys\nsys.argv = ['experiments/{script}', '--help']\n"
  probe += "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as e: assert e.code == 0\n"
  probe += "print({'jax', 'tensorflow', 'torch', 'matplotlib', 'rich'} & set(sys.modules))"
  done = subprocess.run(
    [sys.executable, "-c", probe], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
  )
  assert f"python experiments/{script} --" in done.stdout and done.stdout.endswith("set()\n"), done.stderr


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "--config is missing"),
    (["--config=configs/nope.py"], "no file configs/nope.py. Choose one of"),
    (["--config=configs/tiny_drelu.py", "--config.train.step=3"], "nearest is --config.train.steps"),
    (["--config=configs/tiny_drelu.py", "--config.train.steps=many"], "--config.train.steps=many"),
    (["--config=configs/tiny_drelu.py", "--wrkdir=x"], "Did you mean: workdir"),
    (["--config=configs/tiny_drelu.py", "x"], "were not expected"),
    (["--config=configs/tiny_drelu.py:x"], "takes 0 positional arguments"),
    (["--config", "nope.py"], "no file nope.py. Choose one of"),
    (["--config=README.md"], "cannot be loaded"),
    (["--config=tsparse/errors.py"], "needs a get_config()"),
    (["--config=configs/repeat.py:/tmp"], "holds no model"),
    (["--config=configs/relufy.py:/tmp"], "holds no model"),
    (["--config=configs/tiny_drelu.py", "--config.activation=dreul"], "Did you mean 'drelu'"),
    (["--config=configs/mixtral_drelu.py"], "covers 8 devices and there are 1"),
    (["--config=configs/mixtral_drelu.py", "--config.mesh.expert=1"], "try --config=configs/tiny_moe_drelu.py"),
  ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path):
  done = run(*arguments, f"--workdir={tmp_path}/run")
  assert done.returncode == 2 and sentence in done.stderr, done.stderr
  assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
  assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "--model, --data and --out are needed"),
    (["--model=nowhere", "--data=nothing.jsonl", "--levels=half"], "--levels=half"),
    (["--model=nowhere", "--data=nothing.jsonl", "--tokens=0"], "--tokens=0"),
    (["--model=nowhere", "--data=nothing.jsonl", "--selection=gates"], "the nearest is 'gate'"),
    (["--model=nowhere", "--data=nothing.jsonl", "--parts=counts,all"], "'all' is unknown"),
    (["--model=nowhere", "--data=nothing.jsonl", "--export=gguf"], "--export=gguf is unknown"),
    (["--model=nowhere", "--model=here", "--data=nothing.jsonl"], "nowhere holds no model"),
  ],
)
def test_bad_input_to_an_analysis_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path):
  done = run(*arguments, f"--out={tmp_path}/out/here", script="analyze.py")
  assert done.returncode == 2 and sentence in done.stderr and not list(tmp_path.iterdir())
  assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]


def readme_commands():
  """The commands of the documents in their order, those of a make target after it; blocks marked `tpu` left out."""
  text = "\n".join((ROOT / path).read_text() for path in DOCUMENTS).replace("\\\n", " ")
  for line in re.sub(r"^```bash tpu$.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
    command = line.split("#")[0].strip()
    if command.startswith("make "):
      done = subprocess.run([*command.split()[:2], "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
      yield from (made for made in done.stdout.splitlines() if "python experiments/" in made)
    elif command.startswith("python "):
      yield command


def test_every_command_of_the_readme_runs(tmp_path):
  """In order, small, with runs/ and texts/ in a scratch folder."""
  texts = tmp_path / "texts"
  texts.mkdir()
  (texts / "a.jsonl").write_text("".join(f'{{"text": "{i} bottles of beer on the wall"}}\n' for i in range(100)))
  done = []
  for line in dict.fromkeys(readme_commands()):
    words = [word.replace("runs/", f"{tmp_path}/runs/").replace("texts/", f"{texts}") for word in line.split()]
    script = Path(words[1]).name
    if script == "run.py":
      name = Path(words[2]).stem
      words += [] if "repeat.py" in line else [*SMALL, "--config.train.steps=6"]
      words += ["--config.base.train.steps=6"] * (name == "tiny_relufy")
      words += ["--config.phases.code.tokens=1500"] * (name == "tiny_phases")
      words += [] if "--workdir" in line else [f"--workdir={tmp_path}/runs/{name}"]
    if script == "analyze.py":  # the search of thresholds takes half a minute: once is enough
      words += ["--tokens=1000", *(["--parts=counts,tokens"] if "analyze.py" in done else [])]
    if script == "plan.py":  # compiling for TPUs takes minutes: tests/test_plan.py does it once, on a small model
      words += [f"--out={tmp_path}/plan.json", *(["--nocompile"] if "cpu:" not in line else [])]
    result = run(*words[2:], script=script)
    assert result.returncode == 0, f"{line}\n{result.stderr}"
    done.append(script)
  assert done.count("run.py") > 7 and done.count("convert.py") == 3 and done.count("analyze.py") == 2
  assert done.count("plan.py") > 1 and done.count("generate.py") == 2 and done.count("data.py") > 2
  assert done.count("evaluate.py") == 1


def test_the_jobset_runs_a_command_whose_flags_exist_on_chips_that_fit_together(tmp_path):
  jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
  (slices,) = jobset["spec"]["replicatedJobs"]
  hosts, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  python, script, *arguments = container["command"]
  done = run(*[x for x in arguments if "workdir" not in x], f"--workdir={tmp_path}/run", script=Path(script).name)
  assert done.returncode == 2 and "covers 2 devices and there are 1" in done.stderr  # all of it was understood
  assert python == "python" and f"--config.mesh.data={slices['replicas']}" in arguments

  chips = container["resources"]["limits"]["google.com/tpu"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  assert math.prod(map(int, topology.split("x"))) == hosts["parallelism"] * chips
  assert hosts["completions"] == hosts["parallelism"] and container["resources"]["requests"] == {
    "google.com/tpu": chips
  }
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_bucket_is_no_workdir():
  done = run("--config=configs/tiny_drelu.py", "--workdir=gs://bucket/run")
  assert done.returncode == 2 and "mount the bucket and name its folder" in done.stderr


RUN = str([line for line in readme_commands() if "run.py" in line])


@pytest.mark.parametrize("name", [name for name in CONFIGS if f"configs/{name}.py" not in RUN])
def test_every_other_config_runs_or_says_why_this_machine_cannot(name, tmp_path):
  small = [*SMALL, "--config.train.steps=6"] if name.startswith("tiny") else []
  mesh = ["--config.mesh.expert=1"] if name == "mixtral_drelu" else []  # this is one device
  done = run(f"--config=configs/{name}.py", f"--workdir={tmp_path}/run", *small, *mesh)
  if small:
    assert done.returncode == 0, done.stderr
    assert "activated" in done.stdout and (tmp_path / "run" / "report" / "report.html").exists()
  elif name in ("stories_relufy", "relufy_control"):  # a real model, which is not here: tests/convert runs it
    assert done.returncode == 2 and "stories260k" in done.stderr and not (tmp_path / "run").exists()
  else:
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert all(part in done.stderr for part in ("parameters", "optimizer", "activations", "GB each", "try --config"))


def losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["loss"], line["grad_norm"], line["zero_fraction"]) for line in lines if "loss" in line]


def kill_after(step, workdir, arguments):
  """Starts the run and kills it, with no warning, once `step` steps of `workdir` are logged."""
  process = commands.Command("experiments/run.py", *arguments)
  deadline = time.monotonic() + 200
  path = workdir / "metrics.jsonl"
  while process.running() and time.monotonic() < deadline:
    if path.exists() and path.read_text().count('"loss"') >= step:
      process.kill()
    time.sleep(0.002)
  assert process.wait().returncode == -signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_losses_bit_for_bit(tmp_path):
  def arguments(workdir):
    steps = ["--config.train.steps=40", "--config.base.train.steps=40"]
    return ["--config=configs/tiny_relufy.py", f"--workdir={workdir}", *SMALL, *steps]

  whole, killed = tmp_path / "whole", tmp_path / "killed"
  compiling = {key: value for key, value in ENVIRONMENT.items() if key != "JAX_COMPILATION_CACHE_DIR"}
  assert run(*arguments(whole), env=compiling).returncode == 0  # nor do the bits depend on who compiled
  kill_after(10, killed / "base", arguments(killed))
  kill_after(22, killed, arguments(killed))
  done = run(*arguments(killed))
  assert done.returncode == 0 and "resumed at step" in done.stdout, done.stderr
  assert [step for step, *_ in losses(killed)] == list(range(1, 41))
  assert losses(killed / "base") == losses(whole / "base") and losses(killed) == losses(whole)
  models = [json.loads(Path(w / "report" / "analysis.json").read_text())["models"] for w in (whole, killed)]
  assert [m["loss"] for m in models[0]] == [m["loss"] for m in models[1]]


def test_a_workdir_alone_is_enough_to_repeat_its_experiment(tmp_path):
  first, again = tmp_path / "first", tmp_path / "again"
  assert run("--config=configs/tiny_drelu.py", f"--workdir={first}", *SMALL, "--config.train.steps=8").returncode == 0
  assert run(f"--config=configs/repeat.py:{first}", f"--workdir={again}").returncode == 0
  assert losses(again) == losses(first)
