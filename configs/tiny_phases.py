"""Two phases: a tiny dReLU model trained on prose with a little code, then on code with a little prose.

  python experiments/run.py --config=configs/tiny_phases.py

2 CPU cores, about 3 minutes (tiny_drelu takes 2 for three quarters of the tokens). The report has the model after each
phase, with its loss on prose and on code. A phase of conversations would be
{"order": "sft", "sft": {"tokens": ..., "data": {"train": "chat:FILE", "mixture": ""}}}.
"""

from ml_collections import ConfigDict

from configs import tiny_drelu


def get_config():
  config = tiny_drelu.get_config()
  config.name = "tiny_phases"
  config.data.mixture = "stdlib_docs:0.9,stdlib_code:0.1"
  config.phases.order = "code"
  config.phases.code = ConfigDict({
    "tokens": 300_000,
    "data": {"mixture": "stdlib_docs:0.1,stdlib_code:0.9"},
    "train": {"learning_rate": 1e-3},
  })  # fmt: skip
  return config
