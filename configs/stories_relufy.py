"""ReLUfies a real pretrained model, stories260k (260k parameters, a SwiGLU Llama on TinyStories), to dReLU.

  python experiments/run.py --config=configs/stories_relufy.py:best --config.init=HF_DIR \\
    --config.data.vocabulary=HF_DIR/tokenizer.model \\
    --config.data.train=tinystories/train.jsonl --config.data.validation=tinystories/valid_v2.jsonl

HF_DIR is a Hugging Face directory of karpathy/tinyllamas' stories260K. `:best` is the recipe that lost least for its
zeros in configs/ablations/recipes.py, with its control (the same tokens with SwiGLU kept) in the same report: neurons
turned over and `down` refitted before the first step, the base as the teacher, and a log-sum penalty whose weight a
controller moves to 87 % zeros. Without `:best` it is the plain swap of Turbo Sparse. docs/recipes.md has what both
reach; end-of-text tokens, which this model never saw, are not scored.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(recipe="plain"):
  config = default.get_config("stories_relufy" if recipe == "plain" else f"stories_relufy_{recipe}", "stories260k")
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
  if recipe == "best":
    config.control = ConfigDict({"workdir": "", "train": {"learning_rate": 5e-4}})
    config.train.learning_rate = 4e-3
    config.train.distill_weight = 1.0
    config.sparsity.start = "signs,refit"
    config.sparsity.penalty = "log"
    config.sparsity.target = 0.87
    config.sparsity.dead_after = 100
  return config
