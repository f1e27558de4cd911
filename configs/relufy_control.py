"""The control of a ReLUfication: its base, tokens, batches and schedule, with the base's activation kept and no recipe.

  python experiments/run.py --config=configs/relufy_control.py:CONFIG --workdir=runs/control [the overrides of CONFIG]

CONFIG is the name of a config of ours, stories_relufy if left out. What a ReLUfied model loses against this one is what
its zeros cost; against the base alone, further training would be taken for a better recipe. A config that states
`config.control`, as stories_relufy.py:best does, trains its control itself; several runs share one by
--config.control.workdir=runs/control. stories260k, 1600 steps: 1.369 where the base has 1.373, a difference within its
interval (docs/recipes.md).
"""

import importlib

from tsparse.errors import UserError
from tsparse.recipes.recipe import plain

FOR = "stories_relufy"


def get_config(name=FOR):
  try:
    config = importlib.import_module(f"configs.{name}").get_config()
  except ModuleNotFoundError:
    raise UserError(f"configs/relufy_control.py:{name}: there is no configs/{name}.py.") from None
  config = plain(config)
  config.name = f"{config.name}_control"
  config.activation, config.model.hidden_thresholds = "swiglu", False
  config.train.learning_rate /= 4  # what a swapped activation needs only sets a trained model back
  config.phases.order = ""
  if "control" in config:
    del config.control
  return config
