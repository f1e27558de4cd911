"""ReLUfies any model to dReLU: architecture, vocabulary and parameters are read from it.

  python experiments/run.py --config=configs/relufy.py:MODEL --config.data.train=TEXTS

MODEL is a Hugging Face directory or a workdir of ours. What to set for yours: train.steps (tokens decide how much of
the quality comes back), train.seq_len, train.batch_size, train.learning_rate (Turbo Sparse took 5e-5 for 7B parameters;
2e-3 suits 0.3M), and model.dtype=bfloat16 on an accelerator.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from configs import default
from tsparse.convert.model import open_model


def get_config(model):
  stored = open_model(Path(model))
  fields = dataclasses.asdict(stored.config)
  config = default.get_config(f"relufy_{Path(model).resolve().name}")
  config.init = model
  config.activation = "drelu"
  del fields["activation"]
  config.model = ConfigDict(fields | {"remat": "full"})
  config.data.vocabulary = stored.vocabulary
  config.data.eos = stored.eos
  config.train.seq_len = min(config.train.seq_len, stored.config.max_seq_len)
  config.train.learning_rate = 1e-4
  config.smaller = "configs/tiny_relufy.py"
  return config
