"""The experiment of an existing workdir, to run it again elsewhere. A phase starts again from the stage before it.
Its tokenizer is the copy in the workdir, wherever it was read from.

python experiments/run.py --config=configs/repeat.py:runs/tiny_relufy --workdir=runs/again
"""

import functools
import json
from pathlib import Path

from ml_collections import ConfigDict

from tsparse.data.tokenizer_files import kept
from tsparse.errors import UserError
from tsparse.workdir import defaults, read_config


def get_config(workdir):
  def plain(tree):  # JSON has no tuples, and the fields of a config must not be lists
    return {k: plain(v) if isinstance(v, dict) else tuple(v) if isinstance(v, list) else v for k, v in tree.items()}

  config = read_config(Path(workdir))
  if "train" not in config:
    raise UserError(f"{workdir} records no training: give the workdir of a run.")
  vocabulary = config["data"]["vocabulary"]
  config["data"]["vocabulary"] = kept(vocabulary, Path(workdir)) or vocabulary
  started = Path(workdir) / "init.json"
  if "base" not in config and not config["init"] and started.exists():  # a phase, whose config names no init
    config["init"] = json.loads(started.read_text())["model"]
  for name, value in defaults().items():  # fields that the workdir is older than
    *sections, field = name.split(".")[1:]
    functools.reduce(lambda tree, key: tree.setdefault(key, {}), sections, config).setdefault(field, value)
  return ConfigDict(plain(config))
