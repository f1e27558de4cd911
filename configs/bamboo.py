"""Bamboo v0.1, the model before Turbo Sparse: Mistral-7B with dReLU, trained in two phases.

  python experiments/run.py --config=configs/bamboo.py --config.init=MISTRAL_WORKDIR \\
    --config.data.root=FOLDER --config.data.vocabulary=tokenizer.model

Its model card and blog: 150B tokens at a peak of 5e-5, context 2048, weight decay 0.1; then 50B tokens with more math
and code at 5e-6, context 4096, weight decay 0.01; cosine, 4M tokens a batch, 64 x A800-80G. The result has nearly 85 %
zeros. Not printed there, and taken here: the warm-up, the final learning rates, and the second mixture. Its first is
that of StableLM-3B; the sources of Turbo Sparse, its successor, stand in for it. Not run yet: see mistral_drelu.py.
"""

from ml_collections import ConfigDict

from configs import mistral_drelu

MORE_MATH_AND_CODE = (
  "wanjuan_cc:40,dolma_pes2o:8,pile_academic:3,redpajama_books:7,redpajama_wiki:2,"
  "open_web_math:10,proof_pile_2:5,algebraic_stack:5,starcoder_remaining:12,github_code:8"
)


def get_config():
  config = mistral_drelu.get_config("bamboo")
  config.train.steps = 35_763  # 150B tokens
  config.train.batch_size = 2048
  config.train.seq_len = 2048
  config.phases.order = "math_and_code"
  config.phases.math_and_code = ConfigDict({
    "tokens": 50_000_000_000,
    "data": {"mixture": MORE_MATH_AND_CODE},
    "train": {
      "learning_rate": 5e-6,
      "batch_size": 1024,
      "seq_len": 4096,
      "microbatches": 4,
      "weight_decay": 0.01,
    },
  })  # fmt: skip
  return config
