"""ReLUfies a real pretrained model, stories260k (260k parameters, a SwiGLU Llama on TinyStories), to dReLU.

  python experiments/run.py --config=configs/stories_relufy.py --config.init=HF_DIR \\
    --config.data.vocabulary=HF_DIR/tokenizer.model \\
    --config.data.train=tinystories/train.jsonl --config.data.validation=tinystories/valid_v2.jsonl

HF_DIR is a Hugging Face directory of karpathy/tinyllamas' stories260K. Measured after 1.2M tokens (300 steps, 5 minutes
on 2 busy CPU cores): loss on valid_v2 1.418 (base) -> 6.951 (swapped) -> 1.691 with 72.2 % zeros; end-of-text tokens,
which this model never saw, are scored. The whole 6.6M tokens were not run yet.
"""

from configs import default


def get_config():
  config = default.get_config("stories_relufy", preset="stories260k")
  config.activation = "drelu"
  config.smaller = "configs/tiny_relufy.py"
  config.init = "stories260k"
  config.data.train = "tinystories/train.jsonl"
  config.data.validation = "tinystories/valid_v2.jsonl"
  config.data.vocabulary = "stories260k/tokenizer.model"
  config.data.eos = False  # this model was trained without
  config.train.steps = 1600
  config.train.batch_size = 16
  config.train.seq_len = 256
  config.train.learning_rate = 2e-3
  config.analysis.tokens = 40_000
  return config
