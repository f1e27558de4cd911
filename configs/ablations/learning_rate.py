"""Which peak learning rate a ReLUfication takes, for dReLU and ReLU.

  python experiments/run.py --config=configs/tiny_swiglu.py
  python experiments/sweep.py --config=configs/ablations/learning_rate.py

The paper took 5e-5 for 7B parameters (Table 5).
"""

from configs.ablations import relufication

SWEEP = ("config.activation=relu,drelu", "config.train.learning_rate=3e-4,1e-3,3e-3,1e-2")


def get_config():
  return relufication.get_config("ablation_learning_rate")
