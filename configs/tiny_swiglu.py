"""A 1M-parameter SwiGLU model on the Python standard library, byte by byte.

  python experiments/run.py --config=configs/tiny_swiglu.py

2 CPU cores, 2.5 minutes: loss 1.851 nats per byte on held-out text, perplexity 6.36 after 0.92M tokens.
Its workdir can be ReLUfied: --config=configs/tiny_relufy.py --config.init=runs/tiny_swiglu
"""

from configs import default


def get_config():
  config = default.get_config("tiny_swiglu")
  config.train.steps = 450
  config.train.seq_len = 128
  config.train.learning_rate = 3e-3
  config.analysis.tokens = 32_768
  return config
