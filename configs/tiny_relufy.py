"""ReLUfication end to end: train a tiny SwiGLU base, swap its activation to dReLU, continue training, report.

  python experiments/run.py --config=configs/tiny_relufy.py

2 CPU cores, 2 to 3 minutes: perplexity 6.37 (base) -> 10.26 (swapped) -> 5.45 (recovered, 85.3 % zeros).
With --config.init=WORKDIR that model is the base, and none is trained.
"""

from ml_collections import ConfigDict

from configs import tiny_swiglu


def get_config():
  config = tiny_swiglu.get_config()
  config.name = "tiny_relufy"
  config.base = ConfigDict()  # what is trained first, in WORKDIR/base, when there is no init; other fields as below
  config.base.activation = "swiglu"
  config.base.train = ConfigDict()
  config.base.train.steps = config.train.steps
  config.activation = "drelu"
  return config
