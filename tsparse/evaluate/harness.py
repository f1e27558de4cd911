"""A stored model as lm-evaluation-harness asks for it, so that each of its tasks runs on it.

Texts become tokens, too long ones are cut and answers are ended as by lm-eval's own transformers backend (`hf`). What
is computed is ours: scores.py for log-likelihoods, the decoder (sparse/generate.py) for generated text.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console

from tsparse import sharding
from tsparse.convert.model import Model
from tsparse.data.embedded import check_ids
from tsparse.data.tokenizer import Tokenizer
from tsparse.errors import UserError
from tsparse.evaluate.interventions import Setting, intervention
from tsparse.evaluate.scores import Row, scores
from tsparse.models.counts import ModelCounts, model_zero_fraction
from tsparse.models.transformer import Transformer, abstract_parameters
from tsparse.progress import ProgressLine
from tsparse.sparse.decode import by_layer
from tsparse.sparse.generate import Decoder, decoder_of, stream
from tsparse.sparse.sample import Sampling
from tsparse.sparse.text import stop_tokens
from tsparse.train import checkpoint

SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # of a task's generation_kwargs, beside those that lm-eval reads


@dataclasses.dataclass
class Cut:
  """What did not fit the context: requests that lost tokens on their left, and how many tokens that were."""

  requests: int = 0
  tokens: int = 0

  def add(self, tokens: int):
    """Counts a request that is so many tokens too long, if it is."""
    self.requests += tokens > 0
    self.tokens += max(0, tokens)


class Harness(TemplateLM):
  """One model, evaluated under one setting after the other (`use`).

  Attributes:
    max_length: tokens of the context.
    cut: what was cut off since the last `use`.
    counts: of the hidden since then, None if nothing was scored.
  """

  def __init__(
    self,
    models: Callable[[Setting], Model],
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    embedded: int,
    max_length: int,
    batch_size: int,
    bos: bool,
    mask_shared: bool = False,
    console: Console | None = None,
  ):
    """A harness for the model that `models` gives for each setting, all of one tokenizer.

    Args:
      models: the stored model of a setting, with its predictors if it is "predictor".
      tokenizer: of the model.
      mesh: the devices that score.
      embedded: rows of the model's embedding.
      max_length: tokens of the context.
      batch_size: rows of a forward pass.
      bos: begin each context with BOS.
      mask_shared: mask shared experts too.
      console: where progress is shown.
    """
    super().__init__()
    self.max_length, self.cut, self.counts = max_length, Cut(), None
    self._models, self._tokens, self._mesh, self._rows = models, tokenizer, mesh, batch_size
    self._bos, self._mask_shared, self._console = bos, mask_shared, console or Console(quiet=True)
    self._embedded = embedded
    self._encode = functools.lru_cache(maxsize=1024)(lambda text: tuple(map(int, tokenizer.encode(text))))
    self._held: tuple[Any, Any] = None, None
    self._setting = Setting("off")

  def use(self, setting: Setting):
    """Evaluates under `setting` from now on, and counts anew."""
    self._setting, self.cut, self.counts = setting, Cut(), None

  @property
  def zero_fraction(self) -> float | None:
    """Share of zeros in the hidden of what was scored since `use`."""
    return None if self.counts is None else float(model_zero_fraction(self.counts))

  eot_token_id = property(lambda self: self._tokens.eos)
  prefix_token_id = property(lambda self: self._tokens.bos)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """Ids of a text; BOS comes first where the model begins with one, unless the text spells it out itself."""
    ids = list(self._encode(string))
    front = self._bos if add_special_tokens is None else add_special_tokens
    ids = [self._tokens.bos, *ids] if front and ids[:1] != [self._tokens.bos] else ids
    check_ids(self._tokens, self._embedded, ids)
    return ids

  def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    """(ln p of the continuation after its context, whether greedy decoding would write it) of each request."""
    empty = next((request for request in requests if not request.args[1]), None)
    if empty is not None:
      raise UserError(f"task {empty.task_name}: an answer to {empty.args[0][-60:]!r} is empty, mend the task.")
    return super().loglikelihood(requests, disable_tqdm=True)

  def _loglikelihood_tokens(self, requests: Sequence[tuple], **_) -> list[tuple[float, bool]]:
    askers: dict[Row, list[int]] = {}
    for number, (texts, context, continuation) in enumerate(requests):
      if not 0 < len(continuation) <= self.max_length:
        raise UserError(
          f"{texts[1][:60]!r} after {texts[0][-60:]!r} is {len(continuation)} tokens and must be 1 to "
          f"{self.max_length}, the model's context: leave that question out, or evaluate a model of a longer context."
        )
      whole = (*context, *continuation)
      self.cut.add(len(whole) - 1 - self.max_length)
      row = Row(whole[-self.max_length - 1 : -1], len(continuation))
      askers.setdefault(row, []).append(number)
    answers: list[Any] = [None] * len(requests)
    rows = list(askers)
    model, params = self._holding("scores", self._transformer)
    masks = intervention(self._setting, model.config, self._mask_shared)
    with ProgressLine(self._console, f"{self._setting.name}: answers", 0, len(rows)) as bar:
      for chosen, found, counts in scores(model, params, self._mesh, rows, self._rows, masks):
        self._count(counts)
        for index, (log_p, greedy, last) in zip(chosen, found, strict=True):
          for number in askers[rows[index]]:
            token = requests[number][2][-1]
            answers[number] = float(log_p + last[token]), bool(greedy and last.argmax() == token)
        bar.advance(amount=len(chosen))
    return answers

  def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
    """ln p of each text, in windows of the context; as in lm-eval BOS is predicted too where a text begins with it."""
    windows, owners = [], []
    for number, request in enumerate(requests):
      (text,) = request.args
      rolled = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
      for context, continuation in map(make_disjoint_window, rolled):
        windows.append((("", text), context, continuation))
        owners.append(number)
    found = [log_p for log_p, _ in self._loglikelihood_tokens(windows)]
    return np.bincount(np.array(owners, int), found, len(requests)).tolist()

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
    """What the model writes after each context, up to a stop text, EOS or `max_gen_toks`."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
    texts = [""] * len(requests)
    decoder = self._holding(("decoder", self._setting.method), self._decoder)
    masks = intervention(self._setting, decoder.config, self._mask_shared)
    if masks is not None:
      decoder = dataclasses.replace(decoder, kernels="reference", interventions=by_layer(decoder.config, masks))
    ends = stop_tokens(self._tokens, decoder.path, (), chat=False)
    with ProgressLine(self._console, f"{self._setting.name}: texts", 0, len(requests)) as bar:
      for numbers in groups.values():
        task, kwargs = requests[numbers[0]].task_name, normalize_gen_kwargs(requests[numbers[0]].args[1], 256)
        until, new, sampling = self._generation(task, kwargs)
        prompts = {number: self._prompt(requests[number].args[0], self.max_length - new) for number in numbers}
        numbers.sort(key=lambda number: -len(prompts[number]))
        rows = min(self._rows, len(numbers))  # of every batch: what is compiled for one serves the others
        for start in range(0, len(numbers), rows):
          chosen = numbers[start : start + rows]
          batch = [prompts[number] for number in chosen] + [[self.prefix_token_id]] * (rows - len(chosen))
          drawn = dataclasses.replace(sampling, seed=start)
          for number, text in zip(
            chosen, self._write(decoder, batch, len(chosen), new, drawn, until, ends), strict=True
          ):
            texts[number] = text
          bar.advance(amount=len(chosen))
    return texts

  def _generation(self, task: str, kwargs: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop texts, new tokens and how they are drawn, of normalized generation_kwargs."""
    unknown = sorted(set(kwargs) - {"until", "max_gen_toks", "do_sample", *SAMPLING})
    if unknown:
      raise UserError(
        f"task {task} asks for generation_kwargs {', '.join(unknown)}; known are until, max_gen_toks, do_sample, "
        f"{', '.join(SAMPLING)}: take them out of its YAML."
      )
    if kwargs["max_gen_toks"] >= self.max_length:
      raise UserError(
        f"task {task} generates up to {kwargs['max_gen_toks']} tokens and the context is {self.max_length}: set a "
        "lower max_gen_toks in the generation_kwargs of its YAML."
      )
    given = {name: kwargs[name] for name in SAMPLING if name in kwargs} if kwargs["do_sample"] else {}
    return [text for text in kwargs["until"] if text], kwargs["max_gen_toks"], Sampling(**given)

  def _prompt(self, text: str, room: int) -> list[int]:
    ids = self.tok_encode(text) or [self.prefix_token_id]
    self.cut.add(len(ids) - room)
    return ids[-room:]

  def _write(
    self,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    wanted: int,
    new: int,
    sampling: Sampling,
    until: Sequence[str],
    ends: set[int],
  ) -> list[str]:
    """The continuations of the first `wanted` prompts, without the stop text that ended them."""
    tokens, texts, done = [[] for _ in range(wanted)], [""] * wanted, [False] * wanted
    for step in stream(decoder, prompts, new, sampling):
      for row, token in enumerate(step[:wanted].tolist()):
        if token in ends:
          done[row] = True
        if not done[row]:
          tokens[row].append(token)
          texts[row] = self._tokens.decode(tokens[row])
          done[row] = any(stop in texts[row] for stop in until)
      if all(done):
        break
    return [functools.reduce(lambda text, stop: text.split(stop)[0], until, text) for text in texts]

  def _count(self, counts: ModelCounts):
    counts = jax.tree.map(lambda x: x.astype(np.float64), counts)
    self.counts = counts if self.counts is None else jax.tree.map(np.add, self.counts, counts)

  def _holding(self, what: Any, make: Callable[[], Any]) -> Any:
    """`make()`, kept until something else is asked for: one copy of the parameters is in memory at a time."""
    what = what, self._setting.method == "predictor"
    if self._held[0] != what:
      self._held = None, None
      self._held = what, make()
    return self._held[1]

  def _transformer(self) -> tuple[Transformer, Any]:
    stored = self._models(self._setting)
    model = Transformer(stored.config)
    shapes, logical = abstract_parameters(model)
    with self._console.status("reading the model"):
      return model, stored.restore(checkpoint.abstract(shapes, sharding.shardings(self._mesh, logical)))[0]

  def _decoder(self) -> Decoder:
    method = self._setting.method
    mode = method if method in ("exact", "predictor") else "off"
    with self._console.status("reading the model"):
      return decoder_of(self._models(self._setting), mode)
