"""Converts a model: from Hugging Face or a workdir of ours, to either or to a GGUF, its activation swapped if asked.

python experiments/convert.py --model=HF_DIR --out=DIR --activation=drelu
python experiments/convert.py --model=WORKDIR --out=DIR --format=hf
python experiments/convert.py --model=M --out=DIR --format=gguf          (SwiGLU models, for llama.cpp)
python experiments/convert.py --model=M --out=DIR --format=powerinfer    (dReLU and ReGLU models with predictors)

What PowerInfer splits hot from cold neurons by, experiments/analyze.py --export=powerinfer writes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from tsparse import cli
from tsparse.errors import UserError

MODEL = flags.DEFINE_string("model", None, "A Hugging Face directory (config.json + safetensors) or a workdir of ours.")
OUT = flags.DEFINE_string("out", None, "The folder to write, which must not exist yet.")
FORMAT = flags.DEFINE_string("format", "tsparse", "tsparse (a start for config.init), hf, gguf or powerinfer.")
ACTIVATION = flags.DEFINE_string("activation", "", "Activation of the result. Default: the source's.")
UPCYCLE = flags.DEFINE_integer("upcycle", 0, "Copies the FFN of a dense model into so many experts. 0: none.")
PREDICTORS = flags.DEFINE_string("predictors", None, "Their folder, for powerinfer. Default: MODEL/predictors.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "A tokenizer's file or folder, or bytes. Default: the model's own.")
DTYPE = flags.DEFINE_string("dtype", "", "Of the weights: float32, bfloat16, in a GGUF float16. Default: the source's.")


def main():
  """Converts what the flags say."""
  from rich.console import Console

  from tsparse.convert.convert import convert  # JAX is imported only once the flags are known to be good

  if not MODEL.value or not OUT.value:
    raise UserError("--model and --out are needed: give the model to convert and the folder to write.")
  model = convert(
    Path(MODEL.value),
    Path(OUT.value),
    FORMAT.value,
    activation=ACTIVATION.value,
    dtype=DTYPE.value,
    experts=UPCYCLE.value,
    predictors=Path(PREDICTORS.value) if PREDICTORS.value else None,
    tokenizer=TOKENIZER.value,
    console=Console(),
  )
  config = model.config
  print(f"{OUT.value}: {FORMAT.value}, {config.activation}, {config.num_layers} layers of {config.d_model}")


if __name__ == "__main__":
  cli.script(main, __doc__)
