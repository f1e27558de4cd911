"""What the ablations of ReLUfication start from: runs/tiny_swiglu, trained on with dReLU; one base for all their runs.

python experiments/run.py --config=configs/tiny_swiglu.py
"""

from configs import tiny_drelu


def get_config(name="ablation_relufication"):
  config = tiny_drelu.get_config()
  config.name = name
  config.init = "runs/tiny_swiglu"  # or --config.init=MODEL
  return config
