"""Makes a real pretrained model sparse: stories260k, 260k parameters, a SwiGLU Llama on TinyStories.

  python experiments/run.py --config=configs/stories_relufy.py:best --config.init=HF_DIR \\
    --config.data.vocabulary=HF_DIR/tokenizer.model \\
    --config.data.train=tinystories/train.jsonl --config.data.validation=tinystories/valid_v2.jsonl

HF_DIR is a Hugging Face directory of karpathy/tinyllamas' stories260K. Without `:best` it is the plain swap of Turbo
Sparse to dReLU: after 1600 steps 1.519 with 70.9 % zeros, 0.149 above a control that keeps SwiGLU. The others train
that control too and report the loss above it, with the base as the teacher, `down` refitted before the first step, and
steps of 4 rows. `:best` keeps SwiGLU above thresholds that move to 80.1 % zeros and loses 0.077; `:drelu` turns neurons
over and has a controller move a log-sum penalty to 87.7 % zeros, and loses 0.147. docs/recipes.md says how they were
chosen. End-of-text tokens, which this model never saw, are not scored.
"""

from ml_collections import ConfigDict

from configs import default
from tsparse.errors import UserError

SMALL_STEPS = {  # the same tokens in four times as many steps, the learning rate down to 0
  "train.batch_size": 4, "train.steps": 6400, "data.lanes": 4, "train.learning_rate": 2e-3, "train.warmup_steps": 200,
  "train.final_learning_rate_fraction": 0.0,
}  # fmt: skip
TEACHER = SMALL_STEPS | {"train.distill_weight": 1.0, "sparsity.dead_after": 400}
BEST = TEACHER | {
  "train.learning_rate": 1e-3, "train.distill_temperature": 2.0,
  "activation": "swiglu", "model.hidden_thresholds": True,
  "sparsity.start": "norms,thresholds,refit", "sparsity.moves": "thresholds", "sparsity.target": 0.8,
}  # fmt: skip
DRELU = TEACHER | {"sparsity.start": "signs,refit", "sparsity.penalty": "log", "sparsity.target": 0.875}
RECIPES = {"plain": {}, "best": BEST, "drelu": DRELU}
CONTROL = {"workdir": "", "train": {"learning_rate": 5e-4}}  # a trained model is only set back by the 2e-3 of the swap


def get_config(recipe="plain"):
  if recipe not in RECIPES:
    raise UserError(f"configs/stories_relufy.py:{recipe}: the recipes are {', '.join(RECIPES)}.")
  config = default.get_config("stories_relufy" if recipe == "plain" else f"stories_relufy_{recipe}", "stories260k")
  config.activation = "drelu"
  config.model.remat = "dots"  # so small a model has room for what "full" would compute again
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
  if recipe != "plain":
    config.control = ConfigDict(CONTROL)
  config.update_from_flattened_dict(RECIPES[recipe])
  return config
