"""Mixtral-8x7B ReLUfied to dReLU, zeros inside its experts, with the recipe of Turbo Sparse (section 5, Table 5).

  python experiments/run.py --config=configs/mixtral_drelu.py --config.init=MIXTRAL_WORKDIR \\
    --config.data.root=FOLDER --config.data.vocabulary=tokenizer.model

The recipe is that of configs/mistral_drelu.py; the result has 85 % zeros in its experts. Not run yet: it needs about
750 GB for parameters, gradients and optimizer, over as many devices as there are.

  python experiments/plan.py --config=configs/mixtral_drelu.py --topology=v5p:4x4x8

compiled by libtpu 0.0.42.1 in 8 microbatches of two rows a chip, each chip with one expert of the eight: 4.4 GB of
arguments and 17.5 GB of temporaries in the 102 GB of a chip; the roofline gives 15.5 s a step at least, 542,000
tokens/s at most, 3.2 days for the 150B tokens. Smaller slices: docs/plans.md.
"""

from configs import mistral_drelu


def get_config():
  config = mistral_drelu.get_config("mixtral_drelu", preset="mixtral_8x7b")
  config.smaller = "configs/tiny_moe_drelu.py"
  config.init = "checkpoints/mixtral_8x7b"
  config.data.vocabulary = "checkpoints/mixtral_8x7b/tokenizer.model"
  config.model.moe_impl = "ep_allgather"  # a chip gathers the weights of its own expert only
  config.mesh.expert = 8
  return config
