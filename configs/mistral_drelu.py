"""Mistral-7B ReLUfied to dReLU with the recipe of Turbo Sparse (section 5, Table 5).

  python experiments/run.py --config=configs/mistral_drelu.py --config.init=MISTRAL_WORKDIR \\
    --config.data.root=FOLDER --config.data.vocabulary=tokenizer.model

Table 5: 150B tokens = 17,881 steps of 2048 x 4096, AdamW (0.9, 0.95), cosine 5e-5 -> 5e-6, 1000 warm-up steps, on
64 x A800-80G; the result has 90 % zeros. Weight decay and clipping are not printed there: 0.1 and 1.0 are taken.
Not run yet: it needs about 130 GB for parameters, gradients and optimizer, over as many devices as there are.

  python experiments/plan.py --config=configs/mistral_drelu.py --topology=v5p:4x4x4

compiled by libtpu 0.0.42.1 in 8 microbatches of 4 rows a chip: 1.4 GB of arguments and 12.4 GB of temporaries in the
102 GB of a chip; the roofline gives 18.1 s a step at least, 464,000 tokens/s at most, 3.7 days for the 150B tokens.
On v5e:16x16, one row a chip: 0.3 GB and 3.4 GB of 16 GB; 10.5 s, 797,000 tokens/s, 2.2 days by the same bounds. The
whole table: docs/plans.md.
"""

from configs import default


def get_config(name="mistral_drelu", preset="mistral_7b"):
  config = default.get_config(name, preset)
  config.activation = "drelu"
  config.smaller = "configs/tiny_relufy.py"
  config.init = "checkpoints/mistral_7b"  # a workdir with the SwiGLU parameters
  config.data.train = "turbosparse_150b"  # Table 4: its 15 sources under config.data.root
  config.data.lanes = 64  # one for each host of v5e:16x16
  config.data.vocabulary = "checkpoints/mistral_7b/tokenizer.model"
  config.train.steps = 17_881
  config.train.batch_size = 2048
  config.train.seq_len = 4096
  config.train.microbatches = 8  # of 256 rows, one for each chip of v5e:16x16
  config.train.learning_rate = 5e-5
  config.train.warmup_steps = 1000
  config.train.weight_decay = 0.1
  config.train.checkpoint_every = 500
  config.train.eval_every = 500
  config.analysis.tokens = 1_048_576
  config.analysis.batch_size = 256
  return config
