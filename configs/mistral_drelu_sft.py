"""Mistral-7B as in configs/mistral_drelu.py, then a phase of conversations: loss on what the assistant says.

  python experiments/run.py --config=configs/mistral_drelu_sft.py --config.init=MISTRAL_WORKDIR \\
    --config.data.root=FOLDER --config.data.vocabulary=tokenizer.model

Turbo Sparse names orca-math-word-problems and bagel as SFT data and prints no hyperparameters: 100M tokens of both in
equal shares at 1e-5 are taken. Its published models have two rows more in their embedding, for ChatML's markers; here
the vocabulary stays Mistral's, and the markers are spelled out.
Not run yet.
"""

from ml_collections import ConfigDict

from configs import mistral_drelu


def get_config():
  config = mistral_drelu.get_config("mistral_drelu_sft")
  config.phases.order = "sft"
  config.phases.sft = ConfigDict({
    "tokens": 100_000_000,
    "data": {"train": "turbosparse_sft"},
    "train": {"learning_rate": 1e-5, "batch_size": 256, "microbatches": 1, "warmup_steps": 5},
  })  # fmt: skip
  return config
