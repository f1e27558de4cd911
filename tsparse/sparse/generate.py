"""Generation: a stored model, prompts and how to sample -> text, streamed.

decoder = load(Path("runs/mine"), sparse="exact")         # or "predictor": those beside the model, or `predictors`
for tokens in stream(decoder, [[1, 45, 7], [1, 9]], new_tokens=32): ...      # ids, a token of each row at a time
completions = complete(decoder, ["Once upon", "The"], Request(new_tokens=32))     # text
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsparse.activations import activation
from tsparse.convert.model import Model, open_model
from tsparse.data.chat import END
from tsparse.data.embedded import check_embedded, check_ids, without_token
from tsparse.data.encoding import first_token, load_tokenizer
from tsparse.data.tokenizer import Tokenizer
from tsparse.errors import UserError
from tsparse.models.config import ModelConfig
from tsparse.sparse.break_even import MEASURED, choose_mode
from tsparse.sparse.decode import empty_cache, hidden_entries, hidden_states, logits_of
from tsparse.sparse.kernels import reference
from tsparse.sparse.kernels.reference import MODES
from tsparse.sparse.kernels.table import KERNELS, best_kernels
from tsparse.sparse.layout import DTYPES, arrange
from tsparse.sparse.predictors import stored
from tsparse.sparse.sample import Sampling, choose
from tsparse.sparse.text import Stream, encode_prompt, stop_tokens

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
    mode: which rows of the FFNs are read, one of MODES, or "auto": of a prompt all, and then each layer what is fastest
      at the zeros that the prompt had there (break_even.py).
    kernels: a key of KERNELS.
    tokenizer: None where only ids are wanted.
    path: the folder of the model, which may say what ends a text.
    predictors: those that were merged into it from a folder of their own.
    interventions: of each layer, `decode.by_layer`, which are computed by the kernels of reference.py; () for none.
    unused: bool [V], ids without a token, which are never chosen; None where there are none.
    bos: whether texts begin with BOS, as `config.data.bos`: as the model was trained here, or "auto", as its tokenizer
      does.
  """

  config: ModelConfig
  params: Any
  mode: str
  kernels: str
  tokenizer: Tokenizer | None = None
  path: Path = Path()
  predictors: stored.Predictors | None = None
  interventions: Sequence[Any] = ()
  unused: np.ndarray | None = None
  bos: str = "auto"


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
    bos: whether prompts begin with BOS, "on" or "off"; "auto" is as the decoder says.
  """

  new_tokens: int = 128
  sampling: Sampling = GREEDY
  chat: bool = False
  system: str = ""
  stop_tokens: Sequence[str] = ()
  stops: Sequence[str] = ()
  bos: str = "auto"


@dataclasses.dataclass(frozen=True)
class Completion:
  """One completed prompt; `finish` says why it ends: stop, length (of the request) or context (of the model)."""

  prompt: str
  text: str
  tokens: list[int]
  finish: str
  tokens_per_second: float | None  # of the whole batch, see DEFINITIONS
  modes: tuple[str, ...]  # in which each layer was decoded
  bos: bool  # whether BOS stood before the prompt


def sparse_mode(config: ModelConfig, sparse: str) -> str:
  """The mode that `sparse` asks for. `auto` is "off" where nothing can be skipped; none of its choices changes a token.

  Raises:
    UserError: unknown, or not possible with this model.
  """
  if sparse not in SPARSE:
    raise UserError(f"--sparse={sparse} is unknown: choose one of {', '.join(SPARSE)}.")
  if sparse in ("exact", "predictor") and (reason := dense_for(config)):
    raise UserError(f"--sparse={sparse}: this model has {reason}, which kernels that skip do not know; choose off.")
  if sparse == "exact" and not activation(config.activation).exact_zeros:
    raise UserError(
      f"--sparse=exact: {config.activation} is exactly zero nowhere, so no row may be skipped; choose --sparse=off, or "
      "give the model zeros first (experiments/convert.py --activation=drelu, or fatrelu:0.01 for a threshold)."
    )
  if sparse == "predictor" and not config.predictor_ranks:
    raise UserError(
      "--sparse=predictor: the model holds no predictors and there are none beside it; train some by "
      "experiments/predictors.py, or choose --sparse=exact or --sparse=off."
    )
  return "off" if sparse == "auto" and candidates(config) == ["off"] else sparse


def dense_for(config: ModelConfig) -> str:
  """What a model has for which the kernels of reference.py compute its FFNs, "" for nothing."""
  whole = activation(config.activation).whole_rows
  return f"the activation {config.activation}" if whole else "hidden_thresholds" if config.hidden_thresholds else ""


def candidates(config: ModelConfig) -> list[str]:
  """The modes among which `auto` may choose: those that skip something, and "off"."""
  if dense_for(config):
    return ["off"]
  exact = activation(config.activation).exact_zeros
  return ["off", *(["exact"] if exact else []), *(["predictor"] if config.predictor_ranks else [])]


def choose_modes(config: ModelConfig, kernels: str, zeros: Sequence[float], batch: int) -> tuple[str, ...]:
  """The mode of each layer, from the share of its hidden that was zero and the number of rows that are decoded."""
  if kernels not in MEASURED:  # or, as those of reference.py, read all rows whatever the mode
    return ("off",) * config.num_layers
  shared = [1.0] * config.dense_layers  # of the tokens, that meet a neuron's expert
  routed = config.experts_per_token / config.num_experts if config.num_experts else 1.0
  shared += [routed] * (config.num_layers - config.dense_layers)
  return tuple(
    choose_mode(candidates(config), share, max(1, math.ceil(batch * part)))
    for share, part in zip(zeros, shared, strict=True)
  )


def find_predictors(model: Model, sparse: str, given: Path | None) -> stored.Predictors | None:
  """The predictors to merge into a model: those given, else for `predictor` those beside one that holds none itself.

  They become a part of it, a neuron that they miss is zero in every mode: so `off` and `exact` take none, and `auto`
  only those given, since a folder beside a model is not to change what it says.

  Raises:
    UserError: they are given and `sparse` takes none, or they are not this model's.
  """
  if sparse in ("off", "exact"):
    if given is not None:
      raise UserError(f"--predictors={given} is of no use with --sparse={sparse}: leave one of them out.")
    return None
  if given is None and (sparse == "auto" or model.config.predictor_ranks):
    return None
  folder = given or stored.beside(model.path)
  return None if folder is None else stored.load(folder, model)


def load(path: Path, sparse: str = "auto", dtype: str = "", predictors: Path | None = None) -> Decoder:
  """The model in a folder, of ours or of Hugging Face, ready to decode in float32.

  Args:
    path: the folder.
    sparse: one of SPARSE.
    dtype: of the weights in memory, float32 or bfloat16; "" is as stored.
    predictors: a folder of experiments/predictors.py; None for the one beside the model, where `sparse` is predictor.

  Raises:
    UserError: no such model, or `sparse`, `dtype` or `predictors` do not fit it.
  """
  if dtype not in ("", *DTYPES):
    raise UserError(f"--dtype={dtype} is unknown: choose float32, bfloat16 or nothing, which is as stored.")
  model = open_model(path)
  trained = find_predictors(model, sparse, predictors)
  model = model if trained is None else stored.merge(model, trained)
  return decoder_of(model, sparse, dtype, trained)


def decoder_of(model: Model, sparse: str, dtype: str = "", predictors: stored.Predictors | None = None) -> Decoder:
  """`load` of a model that is open and has the `predictors` merged into it."""
  mode = sparse_mode(model.config, sparse)
  config = dataclasses.replace(model.config, dtype="float32")
  tokenizer = load_tokenizer(model.vocabulary)
  check_embedded(tokenizer, config.vocab_size)
  kernels = best_kernels(config.d_model)
  place = reference.place if mode == "off" else KERNELS[kernels].place
  params = arrange(config, model.leaves()[0], dtype, place)
  unused = without_token(tokenizer, config.vocab_size)
  return Decoder(config, params, mode, kernels, tokenizer, model.path, predictors, unused=unused, bos=model.bos)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def forward(
  config: ModelConfig,
  kernels: str,
  modes: tuple[str, ...],
  params: Any,
  cache: Any,
  tokens: Array,
  start: Array,
  length: Array,
  interventions: Sequence[Any] = (),
) -> tuple[Array, Any, Array]:
  """Logits [B, V] after the last of `tokens` [B, T] of each row that lies below its `length`, cache and entries fired.

  Row b holds the positions start[b], start[b] + 1, ...; those from length[b] on are padding. The rest: hidden_states.
  """
  width = tokens.shape[1]
  positions = start[:, None] + jnp.arange(width, dtype=jnp.int32)
  valid = positions < length[:, None]
  args = params, cache, tokens, positions, valid, interventions
  hidden, cache, fired = hidden_states(config, kernels, modes, *args)
  last = jnp.clip(length - 1 - start, 0, width - 1)
  return logits_of(config, kernels, params, hidden[jnp.arange(len(last)), last]), cache, fired


def bucket(length: int, least: int) -> int:
  """The power of two at or above `length` and `least`: shapes are compiled for those only."""
  return max(least, 1 << (length - 1).bit_length())


def stream(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  new_tokens: int,
  sampling: Sampling = GREEDY,
  tell: Callable[[tuple[str, ...]], None] = lambda modes: None,
) -> Iterator[np.ndarray]:
  """Yields the next token of every row, [B] int32, `new_tokens` times.

  A row's logits do not depend on the others, but for rounding in the attention of a prompt. Nothing ends a row early:
  the caller stops listening to it.

  Args:
    decoder: the model.
    prompts: ids, at least one each, of different lengths as it comes.
    new_tokens: how many; the model's context is not looked at.
    sampling: how each is drawn.
    tell: called with the mode of each layer before the first token.
  """
  config, kernels, params, masks = decoder.config, decoder.kernels, decoder.params, decoder.interventions
  auto = decoder.mode == "auto"
  modes = ("off" if auto else decoder.mode,) * config.num_layers
  length = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(length.max())
  starts = range(0, longest, PIECE)
  widths = [PIECE if start + PIECE <= longest else bucket(longest - start, 16) for start in starts]
  cache = empty_cache(config, len(prompts), bucket(max(longest + new_tokens, sum(widths)), 64))
  padded = np.zeros((len(prompts), sum(widths)), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  logits, fired = None, 0.0
  for start, width in zip(starts, widths, strict=True):
    tokens, first = padded[:, start : start + width], np.full_like(length, start)
    piece, cache, count = forward(config, kernels, modes, params, cache, tokens, first, length, masks)
    logits, fired = piece if logits is None else jnp.where(length[:, None] > start, piece, logits), fired + count
  if auto:
    zeros = 1 - np.asarray(fired) / (length.sum() * np.array(hidden_entries(config)))
    modes = choose_modes(config, kernels, zeros.tolist(), len(prompts))
  tell(modes)
  for step in range(new_tokens):
    tokens = choose(sampling, logits, step, decoder.unused)
    yield np.asarray(tokens)
    if step + 1 < new_tokens:
      at = length + step
      logits, cache, _ = forward(config, kernels, modes, params, cache, tokens[:, None], at, at + 1, masks)


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
    UserError: a prompt is empty, longer than the model's context or not of its tokens, or a stop token is unknown.
  """
  tokenizer, context = decoder.tokenizer, decoder.config.max_seq_len
  bos = first_token(tokenizer, decoder.bos if request.bos == "auto" else request.bos)
  ids = [encode_prompt(tokenizer, prompt, bos, request.chat, request.system) for prompt in prompts]
  for number, row in enumerate(ids):
    check_ids(tokenizer, decoder.config.vocab_size, row)
    if len(row) >= context:
      raise UserError(
        f"prompt {number + 1} is {len(row)} tokens and the model's context is {context}: give at most {context - 1}."
      )
  ends = stop_tokens(tokenizer, decoder.path, request.stop_tokens, request.chat)
  stops = (*request.stops, END) if request.chat else request.stops
  texts = [Stream(tokenizer, row, stops) for row in ids]
  tokens, finish = [[] for _ in ids], [""] * len(ids)
  clock, timed, modes = 0.0, 0, []
  for step, new in enumerate(stream(decoder, ids, request.new_tokens, request.sampling, modes.extend)):
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
    Completion(prompt, text.text, row, why or "length", speed, tuple(modes), bos is not None)
    for prompt, text, row, why in zip(prompts, texts, tokens, finish, strict=True)
  ]


def summary(decoder: Decoder, done: Sequence[Completion]) -> str:
  """How many tokens, how fast and how, in one line."""
  speed = done[0].tokens_per_second
  parts = [f"{sum(len(one.tokens) for one in done)} tokens", f"{speed:.1f} tokens/s" if speed else ""]
  trained = decoder.predictors
  counts = [f"{mode} in {done[0].modes.count(mode)}" for mode in MODES if mode in done[0].modes]
  chosen = f" ({', '.join(counts)} of {decoder.config.num_layers} layers)" if decoder.mode == "auto" else ""
  how = ["BOS before the prompt" if done[0].bos else "no BOS", f"--sparse={decoder.mode}{chosen}"]
  how += [] if trained is None else [f"predictors of {trained.folder} at a recall of {trained.recall:.1%}"]
  return ", ".join([*filter(None, parts), *how, f"{decoder.kernels} kernels"])
