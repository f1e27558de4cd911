"""Generation: a stored model, prompts and how to sample -> text, streamed.

decoder = load(Path("runs/mine"), sparse="exact")        # or "predictor", with those beside the model or `predictors`
for tokens in stream(decoder, [[1, 45, 7], [1, 9]], new_tokens=32): ...      # ids, a token of each row at a time
completions = complete(decoder, ["Once upon", "The"], Request(new_tokens=32))     # text
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.activations import activation
from tsparse.convert.model import Model, open_model
from tsparse.data.tokenizer import Tokenizer
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig
from tsparse.sparse.decode import empty_cache, hidden_states, logits_of
from tsparse.sparse.kernels import build
from tsparse.sparse.kernels.reference import MODES
from tsparse.sparse.layout import DTYPES, arrange
from tsparse.sparse.predictors import stored
from tsparse.sparse.sample import Sampling, choose
from tsparse.sparse.text import IM_END, Stream, encode_prompt, load_tokenizer, stop_tokens

Array = jax.Array
PIECE = 512  # tokens of a prompt that go through the model at once, which bounds the memory of attention
SPARSE = ("auto", *MODES)
GREEDY = Sampling()
DEFINITIONS = {
  "tokens_per_second": "tokens of all rows after the second of each, by the seconds since the second: the first comes "
  "from the prompt, and the step of the second may be compiled first",
}


@dataclasses.dataclass(frozen=True)
class Decoder:
  """A model ready to decode.

  Attributes:
    config: the model.
    params: in the layout of layout.py.
    mode: which rows of the FFNs are read, one of MODES.
    kernels: a key of decode.KERNELS.
    tokenizer: None where only ids are wanted.
    path: the folder of the model, which may say what ends a text.
    predictors: those that were merged into it from a folder of their own.
  """

  config: ModelConfig
  params: Any
  mode: str
  kernels: str
  tokenizer: Tokenizer | None = None
  path: Path = Path()
  predictors: stored.Predictors | None = None


@dataclasses.dataclass(frozen=True)
class Request:
  """What is wanted of `complete`.

  Attributes:
    new_tokens: at most, of each prompt.
    sampling: how they are drawn.
    chat: prompts are turns of a user, written as ChatML.
    system: the system turn before them; "" is none.
    stop_tokens: names of tokens that end a text, as EOS does.
    stops: strings that end a text and are cut off.
  """

  new_tokens: int = 128
  sampling: Sampling = GREEDY
  chat: bool = False
  system: str = ""
  stop_tokens: Sequence[str] = ()
  stops: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
  """One completed prompt; `finish` says why it ends: stop, length (of the request) or context (of the model)."""

  prompt: str
  text: str
  tokens: list[int]
  finish: str
  tokens_per_second: float | None  # of the whole batch, see DEFINITIONS


def best_kernels() -> str:
  """Native on a CPU where they can be built, otherwise jnp."""
  return "native" if jax.default_backend() == "cpu" and build.available() else "reference"


def sparse_mode(config: ModelConfig, sparse: str) -> str:
  """The mode that `sparse` asks for. `auto` takes the one that reads least; none of its choices changes a token.

  Raises:
    UserError: unknown, or not possible with this model.
  """
  exact = activation(config.activation).exact_zeros
  if sparse not in SPARSE:
    raise UserError(f"--sparse={sparse} is unknown: choose one of {', '.join(SPARSE)}.")
  if sparse == "exact" and not exact:
    raise UserError(
      f"--sparse=exact: {config.activation} is exactly zero nowhere, so no row may be skipped; choose --sparse=off, or "
      "give the model zeros first (experiments/convert.py --activation=drelu, or fatrelu:0.01 for a threshold)."
    )
  if sparse == "predictor" and not config.predictor_ranks:
    raise UserError(
      "--sparse=predictor: the model holds no predictors and there are none beside it; train some by "
      "experiments/predictors.py, or choose --sparse=exact or --sparse=off."
    )
  if sparse == "auto":
    return "predictor" if config.predictor_ranks else "exact" if exact else "off"
  return sparse


def find_predictors(model: Model, sparse: str, given: Path | None) -> stored.Predictors | None:
  """The predictors to merge into a model: those given, else those beside one that holds none itself.

  They become a part of it, a neuron that they miss is zero in every mode: so `off` and `exact` take none, and `auto`
  takes those beside the model where less is read with them than by `exact`.

  Raises:
    UserError: they are given and `sparse` takes none, or they are not this model's.
  """
  if sparse in ("off", "exact"):
    if given is not None:
      raise UserError(f"--predictors={given} is of no use with --sparse={sparse}: leave one of them out.")
    return None
  folder = given or (None if model.config.predictor_ranks else stored.beside(model.path))
  found = None if folder is None else stored.load(folder, model)
  worth = found is not None and (given or sparse != "auto" or found.read["predictor"] < found.read["exact"])
  return found if worth else None


def load(path: Path, sparse: str = "auto", dtype: str = "", predictors: Path | None = None) -> Decoder:
  """The model in a folder, of ours or of Hugging Face, ready to decode in float32.

  Args:
    path: the folder.
    sparse: one of SPARSE.
    dtype: of the weights in memory, float32 or bfloat16; "" is as stored.
    predictors: a folder of experiments/predictors.py; None for `predictors` beside the model, if it is there.

  Raises:
    UserError: no such model, or `sparse`, `dtype` or `predictors` do not fit it.
  """
  if dtype not in ("", *DTYPES):
    raise UserError(f"--dtype={dtype} is unknown: choose float32, bfloat16 or nothing, which is as stored.")
  model = open_model(path)
  trained = find_predictors(model, sparse, predictors)
  model = model if trained is None else stored.merge(model, trained)
  mode = sparse_mode(model.config, sparse)
  config = dataclasses.replace(model.config, dtype="float32")
  tokenizer = load_tokenizer(model.vocabulary)
  params = arrange(config, model.leaves()[0], dtype)
  return Decoder(config, params, mode, best_kernels(), tokenizer, path, trained)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def forward(
  config: ModelConfig, kernels: str, mode: str, params: Any, cache: Any, tokens: Array, start: Array, length: Array
) -> tuple[Array, Any]:
  """Logits [B, V] after the last of `tokens` [B, T] of each row that lies below its `length`, and the cache.

  Row b holds the positions start[b], start[b] + 1, ...; those from length[b] on are padding.
  """
  width = tokens.shape[1]
  positions = start[:, None] + jnp.arange(width, dtype=jnp.int32)
  valid = positions < length[:, None]
  hidden, cache = hidden_states(config, kernels, mode, params, cache, tokens, positions, valid)
  last = jnp.clip(length - 1 - start, 0, width - 1)
  return logits_of(config, kernels, params, hidden[jnp.arange(len(last)), last]), cache


def bucket(length: int, least: int) -> int:
  """The power of two at or above `length` and `least`: shapes are compiled for those only."""
  return max(least, 1 << (length - 1).bit_length())


def stream(
  decoder: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[np.ndarray]:
  """Yields the next token of every row, [B] int32, `new_tokens` times.

  A row's logits do not depend on the others, but for rounding in the attention of a prompt. Nothing ends a row early:
  the caller stops listening to it.

  Args:
    decoder: the model.
    prompts: ids, at least one each, of different lengths as it comes.
    new_tokens: how many; the model's context is not looked at.
    sampling: how each is drawn.
  """
  model = decoder.config, decoder.kernels, decoder.mode, decoder.params
  length = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(length.max())
  starts = range(0, longest, PIECE)
  widths = [PIECE if start + PIECE <= longest else bucket(longest - start, 16) for start in starts]
  cache = empty_cache(decoder.config, len(prompts), bucket(max(longest + new_tokens, sum(widths)), 64))
  padded = np.zeros((len(prompts), sum(widths)), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  logits = None
  for start, width in zip(starts, widths, strict=True):
    piece, cache = forward(*model, cache, padded[:, start : start + width], np.full_like(length, start), length)
    logits = piece if logits is None else jnp.where(length[:, None] > start, piece, logits)
  for step in range(new_tokens):
    tokens = choose(sampling, logits, step)
    yield np.asarray(tokens)
    if step + 1 < new_tokens:
      logits, cache = forward(*model, cache, tokens[:, None], length + step, length + step + 1)


def complete(
  decoder: Decoder, prompts: Sequence[str], request: Request, show: Callable[[int, str], None] = lambda row, text: None
) -> list[Completion]:
  """Completes texts.

  Args:
    decoder: the model, with its tokenizer.
    prompts: texts, none of them empty.
    request: what is wanted.
    show: called with (row, new text) as text becomes certain.

  Raises:
    UserError: a prompt is empty or longer than the model's context, or a stop token is unknown.
  """
  tokenizer, context = decoder.tokenizer, decoder.config.max_seq_len
  ids = [encode_prompt(tokenizer, prompt, request.chat, request.system) for prompt in prompts]
  for number, row in enumerate(ids):
    if len(row) >= context:
      raise UserError(
        f"prompt {number + 1} is {len(row)} tokens and the model's context is {context}: give at most {context - 1}."
      )
  ends = stop_tokens(tokenizer, decoder.path, request.stop_tokens, request.chat)
  stops = (*request.stops, IM_END) if request.chat else request.stops
  texts = [Stream(tokenizer, row, stops) for row in ids]
  tokens, finish = [[] for _ in ids], [""] * len(ids)
  clock, timed = 0.0, 0
  for step, new in enumerate(stream(decoder, ids, request.new_tokens, request.sampling)):
    if step == 1:
      clock = time.perf_counter()
    for row, token in enumerate(new.tolist()):
      if finish[row]:
        continue
      timed += step > 1
      tokens[row].append(token)
      if token in ends:
        finish[row] = "stop"
      else:
        show(row, texts[row].add(token))
        full = len(ids[row]) + len(tokens[row]) >= context
        finish[row] = "stop" if texts[row].stopped else "context" if full else ""
      if finish[row]:
        show(row, texts[row].rest())
    if all(finish):
      break
  speed = timed / (time.perf_counter() - clock) if timed else None
  for row, text in enumerate(texts):
    show(row, text.rest())
  return [
    Completion(prompt, text.text, row, why or "length", speed)
    for prompt, text, row, why in zip(prompts, texts, tokens, finish, strict=True)
  ]


def summary(decoder: Decoder, done: Sequence[Completion]) -> str:
  """How many tokens, how fast and how, in one line."""
  speed = done[0].tokens_per_second
  parts = [f"{sum(len(one.tokens) for one in done)} tokens", f"{speed:.1f} tokens/s" if speed else ""]
  trained = decoder.predictors
  how = [f"--sparse={decoder.mode}"]
  how += [] if trained is None else [f"predictors of {trained.folder} at a recall of {trained.recall:.1%}"]
  return ", ".join([*filter(None, parts), *how, f"{decoder.kernels} kernels"])
