"""Recipes for sparsity side by side on stories260k: loss above the control by zeros, a point for each recipe.

  python experiments/run.py --config=configs/relufy_control.py --workdir=runs/recipes/control OVERRIDES
  python experiments/run.py --config=configs/ablations/recipes.py:NAME --workdir=runs/recipes/NAME OVERRIDES \\
    --config.control.workdir=runs/recipes/control

OVERRIDES are those of configs/stories_relufy.py (init, data, vocabulary), and --config.train.steps=400 for both where an
hour must be enough for several of RECIPES. Each NAME is a row of them: what it changes of the plain swap of Turbo
Sparse. Two of the methods need no training and no row: CATS and TEAL are curves of the control in each report
(config.analysis.thresholds). What came out: docs/recipes.md.
"""

from ml_collections import ConfigDict

from configs import stories_relufy

KL = {"train.distill_weight": 0.7}
BEST = {
  "train.distill_weight": 1.0, "train.learning_rate": 4e-3, "sparsity.start": "signs,refit", "sparsity.penalty": "log",
}  # fmt: skip

RECIPES = {
  # the table of the literature, and what it is compared with
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
  "start_kl_4e-3": BEST,
  "l1_80": BEST | {"sparsity.penalty": "l1", "sparsity.target": 0.81},
  "l1_87": BEST | {"sparsity.penalty": "l1", "sparsity.target": 0.875},
  "log_80": BEST | {"sparsity.target": 0.81},
  "log_87": BEST | {"sparsity.target": 0.875},
  "log_87_per_layer": BEST | {"sparsity.target": 0.875, "sparsity.per_layer": True},
  "log_93": BEST | {"sparsity.target": 0.93},
  "calibrated_87": BEST | {"sparsity.calibrate": 0.875},  # thresholds after training alone
  "learned_thresholds": BEST | {
    "model.hidden_thresholds": True, "sparsity.threshold": 0.02, "sparsity.target": 0.875,
  },
  "ffn_only": BEST | {"train.rules": "layers/ffn/(gate|up|down)=1; .*=0", "sparsity.target": 0.81},
  "low_rank": BEST | {
    "train.rules": "layers/ffn/(gate|up|down)=1; layers/attention/.*=lora:8; .*=0.3", "sparsity.target": 0.81,
  },
}  # fmt: skip


def get_config(name="log_87"):
  config = stories_relufy.get_config()
  config.name = f"recipes_{name}"
  config.control = ConfigDict({"workdir": "", "train": {"learning_rate": 5e-4}})
  config.analysis.thresholds = True
  for field, value in RECIPES[name].items():
    *sections, last = field.split(".")
    section = config
    for each in sections:
      section = section[each]
    section[last] = value
  return config
