"""How many tokens a ReLUfication takes: 0.1M to 1.8M, each with a schedule of its own.

  python experiments/run.py --config=configs/tiny_swiglu.py
  python experiments/sweep.py --config=configs/ablations/tokens.py

The paper took 150B for 7B and 47B parameters, under 1 % of the 15T that it counts for training from scratch.
"""

from configs.ablations import relufication

SWEEP = ("config.train.steps=56,112,225,450,900",)


def get_config():
  config = relufication.get_config("ablation_tokens")
  config.train.warmup_steps = 10  # of the shortest too
  return config
