"""A sweep: its runs listed, run here, or written for another scheduler; then their results. experiments/sweep.py calls
`run`.

SWEEP/sweep.json            command; of each run values, workdir and state: new, begun, running, done, stopped, failed
SWEEP/NAME/                 the workdir of a run, named by what differs
SWEEP/logs/NAME.txt         what it printed
SWEEP/sweep.csv  sweep.png  the results side by side; report/ is the whole report (tsparse/sweep/gather.py)
"""

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tsparse import files
from tsparse import workdir as workdirs
from tsparse.errors import RunFailure, UserError
from tsparse.sweep.emit import EMITTERS
from tsparse.sweep.gather import gather
from tsparse.sweep.launch import launch
from tsparse.sweep.runs import Run


def run(
  runs: Sequence[Run],
  folder: Path,
  parallel: int = 1,
  dry_run: bool = False,
  only_gather: bool = False,
  emit: str | None = None,
  jobset: Path = Path("launch/jobset.yaml"),
  console: Console | None = None,
):
  """Does what the flags of experiments/sweep.py say with the runs of `folder`.

  Raises:
    UserError: flags that do not go together or are out of range, or a folder that is in use; nothing was started.
    RunFailure: some run failed; the results of the others are gathered.
    Stopped: by a signal; the runs have saved themselves.
  """
  console = console or Console()
  if parallel < 1:
    raise UserError(f"--parallel={parallel}: at least one run at a time.")
  asked = [name for name, on in (("--dry_run", dry_run), ("--gather", only_gather), ("--emit", emit)) if on]
  if len(asked) > 1:
    raise UserError(f"{' and '.join(asked)} exclude each other: give one.")
  if emit and emit not in EMITTERS:
    nearest = difflib.get_close_matches(emit, EMITTERS, n=1, cutoff=0.0)[0]
    raise UserError(f"--emit={emit} is unknown: choose {', '.join(EMITTERS)}; the nearest is {nearest}.")
  if emit:
    print(EMITTERS[emit](runs, folder.name, parallel, jobset), end="")
  elif dry_run:
    for each in runs:
      console.print(f"{each.name}  {each.state}", highlight=False, markup=False, soft_wrap=True)
      command = shlex.join(["python", "experiments/run.py", *each.arguments])
      console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
  elif only_gather:
    gather(runs, folder, {each.name: (each.state, "") for each in runs}, console)
  else:
    _run(runs, folder, parallel, console)


def _run(runs: Sequence[Run], folder: Path, parallel: int, console: Console):
  with workdirs.lock(folder):
    states = {each.name: (each.state, "") for each in runs}

    def write():
      rows = []
      for each in runs:
        state, why = states[each.name]
        rows.append({
          "name": each.name, "state": state, "why": why, "values": each.values, "workdir": str(each.workdir)
        })  # fmt: skip
      files.write(folder / "sweep.json", files.to_json({"command": shlex.join(sys.argv), "runs": rows}))

    def record(each: Run, state: str, why: str):
      states[each.name] = state, why
      write()

    write()
    launch(runs, parallel, folder / "logs", record, console)
    gather(runs, folder, states, console)
  left = {name: why for name, (state, why) in states.items() if state != "done"}
  if left:
    name, why = next(iter(left.items()))
    raise RunFailure(
      f"{len(left)} of {len(runs)} runs are not done, {name} among them ({why.rstrip('.')}). All they printed is in "
      f"{folder / 'logs'}; the same command tries them again."
    )
