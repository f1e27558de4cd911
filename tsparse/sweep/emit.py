"""A sweep as what other schedulers take: a shell script, a Slurm job array, JobSets of Kubernetes.

Every word of a command is quoted by shlex, or an item of a YAML list: no text of the user's is ever read by a shell.
"""

import copy
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from tsparse.errors import UserError
from tsparse.sweep.launch import RUN
from tsparse.sweep.runs import Run

START = """\
cd -- {here}
python=${{PYTHON:-python}}  # PYTHON=/path/to/python names another
"""
SHELL = """\
#!/usr/bin/env bash
# {title}: the {count} runs of a sweep, one after the other. Runs that are done are left out; one that fails does not
# stop the rest. Stop it by Ctrl-C; then the same script goes on.
{start}
failed=0
run() {{
  [ -e "$1/report/analysis.json" ] && return
  "$python" "${{@:2}}" && return
  [ $? -eq 130 ] && exit 130
  failed=1
}}
{commands}
exit "$failed"
"""
SLURM = """\
#!/usr/bin/env bash
# {title}: the {count} runs of a sweep as a job array. Resources go on the command line: sbatch --gpus=1 --time=4:00:00
#SBATCH --job-name={job}
#SBATCH --array=0-{last}{at_once}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
{start}
# exec: the signal above, 300 seconds before the end of the time, reaches the run, which saves itself; submitted again,
# it goes on, and one that is done ends at once.
run() {{ [ -e "$1/report/analysis.json" ] || exec "$python" "${{@:2}}"; }}
case "$SLURM_ARRAY_TASK_ID" in
{commands}
esac
"""


def shell(runs: Sequence[Run], title: str, parallel: int, pattern: Path) -> str:
  """A bash script; UserError for more than one run at a time."""
  del pattern
  _one_at_a_time("shell", parallel)
  commands = "\n".join(f"run {_words(run)}" for run in runs)
  return SHELL.format(title=_comment(title), count=len(runs), start=_start(), commands=commands)


def slurm(runs: Sequence[Run], title: str, parallel: int, pattern: Path) -> str:
  """A script for sbatch: an array of which each task is a run, at most `parallel` at a time where that is above 1."""
  del pattern
  cases = "\n".join(f"  {i}) run {_words(run)} ;;" for i, run in enumerate(runs))
  at_once = f"%{parallel}" if parallel > 1 else ""
  return SLURM.format(
    title=_comment(title),
    count=len(runs),
    job=_dns(title),
    last=len(runs) - 1,
    at_once=at_once,
    start=_start(),
    commands=cases,
  )


def jobset(runs: Sequence[Run], title: str, parallel: int, pattern: Path) -> str:
  """YAML documents, a JobSet for each run: `pattern` with another name, and its container's command replaced.

  Raises:
    UserError: the pattern is no JobSet of one container, or more than one at a time is asked for.
  """
  import yaml

  _one_at_a_time("jobset", parallel)
  try:
    whole = yaml.safe_load(pattern.read_text())
    _container(whole)["command"]
    whole["metadata"]["name"]
  except OSError as error:
    raise UserError(
      f"--jobset={pattern} cannot be read ({error.strerror}): give a file like launch/jobset.yaml."
    ) from None
  except (yaml.YAMLError, KeyError, TypeError, ValueError):
    raise UserError(
      f"--jobset={pattern} is no JobSet with a name and one container with a command: start from launch/jobset.yaml."
    ) from None
  documents = []
  for i, run in enumerate(runs):
    document = copy.deepcopy(whole)
    metadata = document["metadata"]
    metadata["name"] = f"{_dns(title)}-{i}"
    metadata["annotations"] = metadata.get("annotations", {}) | {"tsparse/run": run.name}
    words = ["python", "experiments/run.py", *run.arguments]
    _container(document)["command"] = [word.replace("$", "$$") for word in words]  # Kubernetes expands $(NAME)
    documents.append(document)
  return yaml.safe_dump_all(documents, sort_keys=False, width=120)


EMITTERS: dict[str, Callable[[Sequence[Run], str, int, Path], str]] = {"shell": shell, "slurm": slurm, "jobset": jobset}


def _container(document: dict) -> dict:
  """The one container of a JobSet."""
  (job,) = document["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  return container


def _words(run: Run) -> str:
  """Workdir, script and flags, as words of a shell."""
  return shlex.join([str(run.workdir), os.path.relpath(RUN), *run.arguments])


def _start() -> str:
  return START.format(here=shlex.quote(os.getcwd())).rstrip()


def _comment(title: str) -> str:
  return re.sub(r"[^\w.-]+", "_", title)


def _dns(title: str) -> str:
  """A name as Kubernetes takes it, short enough for what it puts behind."""
  return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:30] or "sweep"


def _one_at_a_time(kind: str, parallel: int):
  if parallel != 1:
    raise UserError(f"--parallel={parallel} with --emit={kind}: it is for runs of this machine and for --emit=slurm.")
