"""A tiny Mixtral with dReLU inside its experts: 4 experts, 2 for each token, on the Python standard library.

  python experiments/run.py --config=configs/tiny_moe_drelu.py

2 CPU cores, 4 minutes with --config.model.moe_impl=dense: perplexity 6.84, 83.2 % zeros in the experts after
0.61M tokens (before documents were weighed by their tokens; not run again since).
"""

from configs import default


def get_config():
  config = default.get_config("tiny_moe_drelu", preset="tiny_moe")
  config.activation = "drelu"
  config.train.steps = 300
  config.train.seq_len = 128
  config.train.learning_rate = 3e-3
  config.analysis.tokens = 32_768
  return config
