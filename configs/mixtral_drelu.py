"""Mixtral-8x7B ReLUfied to dReLU, zeros inside its experts, with the recipe of Turbo Sparse (section 5, Table 5).

  python experiments/run.py --config=configs/mixtral_drelu.py --config.init=MIXTRAL_WORKDIR \\
    --config.data.root=FOLDER --config.data.vocabulary=tokenizer.model

The recipe is that of configs/mistral_drelu.py; the result has 85 % zeros in its experts. Not run yet: it needs about
750 GB for parameters, gradients and optimizer, over as many devices as there are.
"""

from configs import mistral_drelu


def get_config():
  config = mistral_drelu.get_config("mixtral_drelu", preset="mixtral_8x7b")
  config.smaller = "configs/tiny_moe_drelu.py"
  config.init = "checkpoints/mixtral_8x7b"
  config.data.vocabulary = "checkpoints/mixtral_8x7b/tokenizer.model"
  return config
