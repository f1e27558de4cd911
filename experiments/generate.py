"""Generates text with a model, dense or skipping the neurons that are zero.

  python experiments/generate.py --model=M --prompt=TEXT
  python experiments/generate.py --model=M --prompt=TEXT --chat --temperature=0.7 --top_p=0.9 --sparse=exact

M is a workdir of ours or a Hugging Face directory. One prompt is streamed as it comes; several are completed together.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from tsparse import cli, files
from tsparse.errors import UserError

MODEL = flags.DEFINE_string("model", None, "A workdir of ours or a Hugging Face directory.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to go on from; may be repeated.")
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens generated at most.", lower_bound=1)
SPARSE = flags.DEFINE_string("sparse", "auto", "Which neurons are read: off (all), exact, predictor, or auto.")
PREDICTORS = flags.DEFINE_string("predictors", None, "Their folder. Default: MODEL/predictors with --sparse=predictor.")
DTYPE = flags.DEFINE_string("dtype", "", "Of the weights in memory: float32 or bfloat16. Default: as stored.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; 0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from so many likeliest tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens of this probability together.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Sample from tokens at least this times as likely as the likeliest.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
CHAT = flags.DEFINE_boolean("chat", False, "The prompt is a turn of a user, in ChatML.")
SYSTEM = flags.DEFINE_string("system", "", "The system turn of --chat.")
BOS = flags.DEFINE_enum(
  "bos", "auto", ["auto", "on", "off"], "Prompts begin with BOS; auto: as the model was trained, or its tokenizer does."
)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the answer and is cut off; may be repeated.")
STOP_TOKEN = flags.DEFINE_multi_string("stop_token", [], "Token that ends the answer; may be repeated.")
JSON = flags.DEFINE_boolean("json", False, "Print a JSON object in the end and nothing before.")


def main():
  """Generates what the flags say."""
  from tsparse.progress import Compiling
  from tsparse.sparse.generate import Request, complete, load, summary  # JAX only after the flags
  from tsparse.sparse.sample import Sampling

  if not MODEL.value or not PROMPT.value:
    raise UserError("--model and --prompt are needed: give the model and the text to go on from.")
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, SEED.value)
  request = Request(NEW_TOKENS.value, sampling, CHAT.value, SYSTEM.value, STOP_TOKEN.value, STOP.value, BOS.value)
  predictors = Path(PREDICTORS.value) if PREDICTORS.value else None
  decoder = load(Path(MODEL.value), SPARSE.value, DTYPE.value, predictors)
  streamed = len(PROMPT.value) == 1 and not JSON.value
  with Compiling() as compiling:
    show = compiling.after(lambda _, text: streamed and print(text, end="", flush=True))
    done = complete(decoder, PROMPT.value, request, show)
  if JSON.value:
    fields = {"sparse": decoder.mode, "kernels": decoder.kernels, "compile_seconds": round(compiling.seconds, 2)}
    print(files.to_line(fields | {"completions": list(map(dataclasses.asdict, done))}))
    return
  print("" if streamed else "\n".join(f"--- {one.prompt}\n{one.text}" for one in done))
  print(f"[{summary(decoder, done)}, compiled in {compiling.seconds:.1f} s]", file=sys.stderr)


if __name__ == "__main__":
  cli.script(main, __doc__)
