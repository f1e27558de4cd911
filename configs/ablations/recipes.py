"""Recipes for sparsity side by side on stories260k: loss above the control by zeros, a point for each recipe.

  python experiments/run.py --config=configs/relufy_control.py OVERRIDES
  python experiments/sweep.py --config=configs/ablations/recipes.py OVERRIDES

OVERRIDES are those of configs/stories_relufy.py (init, data, vocabulary), and --config.train.steps=300 in both where
it is to take less than an hour on 2 cores (with --parallel=2; the rows called small, with 4 rows a step, then read a
fourth of what the others read).
Each name is a row of RECIPES, what it changes of the plain swap of Turbo Sparse; --sweep="config=plain,log_87" runs
some of them. Two methods need no training and no row: CATS and TEAL are curves of the control in the report of plain
(config.analysis.thresholds). What came out: docs/recipes.md.
"""

from ml_collections import ConfigDict

from configs import stories_relufy
from tsparse.errors import UserError

KL = {"train.distill_weight": 0.7}
TOPK = {"train.distill_weight": 1.0, "sparsity.start": "refit"}
OURS = {
  "train.distill_weight": 1.0, "train.learning_rate": 4e-3, "sparsity.start": "signs,refit", "sparsity.penalty": "log",
}  # fmt: skip
# `:best` in the batches and with the schedule of the control
JUMP = {name: value for name, value in stories_relufy.BEST.items() if name not in stories_relufy.SMALL_STEPS}

RECIPES = {
  # those of papers, and their parts
  "plain": {},  # Turbo Sparse, arXiv 2406.05955
  "plain_4e-3": {"train.learning_rate": 4e-3},
  "reglu": {"activation": "relu"},  # ReLU Strikes Back, arXiv 2310.04564, stage 1
  "shifted_relu": {"activation": "shifted_relu:0.5"},  # the same, section 5.3
  "relu2": {"activation": "relu2"},  # ReLU^2 Wins, arXiv 2402.03804
  "qsparse": {"activation": "qsparse:0.8"},  # arXiv 2407.10969
  "prosparse": {  # arXiv 2402.13516: ReGLU, staged L1, and a threshold (its FATReLU, here on the hidden)
    "activation": "relu", "sparsity.stages": "0.15:0,0.2:0.001,0.6:0.005,1:0.01", "sparsity.calibrate": 0.89,
  },
  "gradual": {"sparsity.swap_until": 0.5},
  "gradual_l1": {"sparsity.swap_until": 0.5, "sparsity.stages": "0:0,0.5:0.003"},
  "kl": KL,
  "kl_l1_0.003": KL | {"sparsity.stages": "0:0,0.5:0.003"},
  "kl_l1_0.01": KL | {"sparsity.stages": "0:0,0.5:0.01"},
  # ours, one change after the other
  "start": {"sparsity.start": "signs,refit"},
  "signs_kl": KL | {"sparsity.start": "signs"},
  "start_kl": KL | {"sparsity.start": "signs,refit"},
  "start_match_kl": KL | {"sparsity.start": "signs,refit", "train.match_until": 0.1},
  "start_kl_4e-3": OURS,
  "l1_80": OURS | {"sparsity.penalty": "l1", "sparsity.target": 0.81},
  "l1_87": OURS | {"sparsity.penalty": "l1", "sparsity.target": 0.875},
  "log_80": OURS | {"sparsity.target": 0.81},
  "log_87": OURS | {"sparsity.target": 0.875},
  "log_87_per_layer": OURS | {"sparsity.target": 0.875, "sparsity.per_layer": True},
  "topk_80": TOPK | {"activation": "topk:0.8"},  # zeros by comparison, no penalty: SwiGLU in its largest entries
  "topk_87": TOPK | {"activation": "topk:0.875"},
  "jump_80": JUMP,  # no ReLU: SwiGLU above a threshold for each layer, which is moved to the target
  "jump_87": JUMP | {"sparsity.target": 0.875},
  "small_80": stories_relufy.DRELU | {"sparsity.target": 0.81},  # the same tokens in four times as many steps
  "small_87": stories_relufy.DRELU,
  "small_jump_80": stories_relufy.BEST,
  "log_93": OURS | {"sparsity.target": 0.93},
  "calibrated_87": OURS | {"sparsity.calibrate": 0.875},  # thresholds after training alone
  "learned_thresholds": OURS | {
    "model.hidden_thresholds": True, "sparsity.threshold": 0.02, "sparsity.target": 0.875,
  },
  "ffn_only": OURS | {"train.rules": "layers/ffn/(gate|up|down)=1; .*=0", "sparsity.target": 0.81},
  "low_rank": OURS | {
    "train.rules": "layers/ffn/(gate|up|down)=1; layers/attention/.*=lora:8; .*=0.3", "sparsity.target": 0.81,
  },
}  # fmt: skip
SWEEP = (f"config={','.join(RECIPES)}",)


def get_config(name="plain"):
  if name not in RECIPES:
    raise UserError(f"configs/ablations/recipes.py:{name}: the recipes are {', '.join(RECIPES)}.")
  config = stories_relufy.get_config()
  config.name = "ablation_recipes"
  config.control = ConfigDict(stories_relufy.CONTROL)
  config.control.workdir = "runs/stories_relufy_control"
  if name == "plain":
    config.analysis.thresholds = True  # CATS and TEAL of the control, which is the same in all
  else:
    config.analysis.levels = ()  # most of the time of a row would be curves of the base and the control, again
  config.update_from_flattened_dict(RECIPES[name])
  return config
