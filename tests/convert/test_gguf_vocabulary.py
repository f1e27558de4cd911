"""Tokenizers in GGUF files: cut and merged as llama.cpp does, in plain Python, their ids are those of the tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tsparse.convert.gguf_vocabulary import (
  BYTE,
  CONTROL,
  CUTS,
  NORMAL,
  SPACE,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
  read_vocabulary,
)
from tsparse.data import load_tokenizer
from tsparse.errors import UserError

WORDS = ("the", "cat", "sat", "on", "that", "then", "cattle", "ate", "oats", "while", "rain", "ran", "lane", "again")
TEXT = [" ".join(np.random.default_rng(i).choice(WORDS, 30)) for i in range(60)]
ODD = ("  the  cat\n\n sat", "naïve Zürich 🚀 12345", "don't I'LL x=1;\r\n  y", "<|im_end|> the <|im_end|>")
SAMPLES = (*TEXT[:5], *ODD)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Name -> folder of a tokenizer."""
  root = tmp_path_factory.mktemp("tokenizers")

  def sentencepiece_model(name, **options):
    (root / name).mkdir()
    with (root / name / "tokenizer.model").open("wb") as file:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=file, vocab_size=340, minloglevel=2, hard_vocab_limit=False,
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
           "remove_extra_whitespaces": False, **options},
      )  # fmt: skip
    return root / name

  model = sentencepiece_model("sentencepiece")
  end, cow = {"content": "<|im_end|>", "special": True}, {"content": f"{SPACE}the{SPACE}cow", "special": False}
  added = {"340": end, "341": cow}
  (model / "tokenizer_config.json").write_text(
    json.dumps({"added_tokens_decoder": added, "chat_template": [{"name": "default", "template": "{{ x }}"}]})
  )
  sentencepiece_model("unigram", model_type="unigram")
  sentencepiece_model("nfkc", normalization_rule_name="nmt_nfkc")
  sentencepiece_model("bare", byte_fallback=False)

  pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
  table = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
  halves = [[(t[:i], t[i:]) for i in range(1, len(t)) if {t[:i], t[i:]} <= table.keys()] for t in table]
  merges = [pair for pairs in halves for pair in pairs if not pair[0].startswith("<")]
  bpe = Tokenizer(models.BPE(table, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
  bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
  bpe.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
  bpe.decoder = decoders.Metaspace()
  lists = {"json": merges, "shuffled": merges[::2] + merges[1::2], "partial": merges[1:]}
  for name, pairs in lists.items():
    (root / name).mkdir()
    whole = json.loads(bpe.to_str())
    whole["model"]["merges"] = pairs
    (root / name / "tokenizer.json").write_text(json.dumps(whole))
    (root / name / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))

  for name, (pattern, ignore) in {**CUTS, "other": (r"\s+|\S+", False)}.items():
    level = Tokenizer(models.BPE(ignore_merges=ignore))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    level.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_alone])
    level.decoder = decoders.ByteLevel()
    level.train_from_iterator(TEXT, trainers.BpeTrainer(
      vocab_size=320, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    (root / name).mkdir()
    level.save(str(root / name / "tokenizer.json"))
    (root / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
  return root


def merged(symbols, rank):
  """Neighbours merged, those of the lowest rank first and the leftmost of them; rank: pair -> number or None."""
  while True:
    ranked = [(r, i) for i in range(len(symbols) - 1) if (r := rank(symbols[i], symbols[i + 1])) is not None]
    if not ranked:
      return symbols
    _, i = min(ranked)
    symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def llama_ids(vocabulary, text):
  """Ids of llama.cpp's `llama` tokenizer; special tokens are cut out of the text first."""
  table = {token: i for i, token in enumerate(vocabulary.tokens)}
  kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
  special = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED)]
  for token in special:
    if token in text:
      before, _, after = text.partition(token)
      return llama_ids(vocabulary, before) + [table[token]] + llama_ids(vocabulary, after)
  if not text:
    return []
  symbols = list((" " * vocabulary.prefix + text).replace(" ", SPACE))
  symbols = merged(symbols, lambda a, b: -vocabulary.scores[table[a + b]] if a + b in table else None)
  ids = [[table[s]] if s in table else [table[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
  return [i for each in ids for i in each]


@pytest.mark.parametrize("name", ["sentencepiece", "json"])
def test_llama_merges_by_the_scores_of_the_file_as_the_tokenizer_does(name, folders):
  tokenizer = load_tokenizer(str(folders / name))
  vocabulary = read_vocabulary(str(folders / name), 350)
  assert (vocabulary.model, vocabulary.pre, vocabulary.prefix) == ("llama", "default", True)
  assert vocabulary.add_bos == (name == "sentencepiece")  # no post-processor puts one before the texts of the other
  assert [read_vocabulary(str(folders / name), 350, bos).add_bos for bos in ("on", "off")] == [True, False]
  for text in SAMPLES:
    if name == "sentencepiece" or "<" not in text:
      assert llama_ids(vocabulary, text) == list(tokenizer.encode(text)), text
  assert (vocabulary.bos, vocabulary.eos, vocabulary.unk) == (tokenizer.bos, tokenizer.eos, tokenizer.unk) == (1, 2, 0)
  assert vocabulary.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and vocabulary.types[258:260] == [BYTE, NORMAL]
  assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == 350
  assert vocabulary.tokens[-1] == "[PAD349]" and vocabulary.types[-1] == UNUSED
  if name == "sentencepiece":
    assert vocabulary.tokens[340:342] == ["<|im_end|>", " the cow"]
    assert vocabulary.types[340:342] == [CONTROL, USER_DEFINED] and vocabulary.template == "{{ x }}"


@pytest.mark.parametrize("name", CUTS)
def test_gpt2_has_the_tokens_merges_and_cut_of_a_byte_level_tokenizer(name, folders):
  tokenizer = load_tokenizer(str(folders / name))
  vocabulary = read_vocabulary(str(folders / name), 330)
  assert (vocabulary.model, vocabulary.pre, vocabulary.add_bos) == ("gpt2", name, False)
  assert {token: vocabulary.tokens[i] for token, i in tokenizer.table.items()} == {t: t for t in tokenizer.table}
  order = {tuple(pair.split(" ")): i for i, pair in enumerate(vocabulary.merges)}
  letters = read_vocabulary("bytes", 259).tokens[3:]
  word = " again"  # one piece of every cut
  symbols = merged([letters[byte] for byte in word.encode()], lambda a, b: order.get((a, b)))
  assert [vocabulary.tokens.index(symbol) for symbol in symbols] == list(tokenizer.encode(word)) and len(symbols) < 6
  assert vocabulary.types[:3] == [CONTROL, CONTROL, NORMAL] and (vocabulary.bos, vocabulary.eos) == (0, 0)


def test_bytes_are_256_letters_and_no_merge_that_could_happen():
  vocabulary = read_vocabulary("bytes", 264)
  decode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  text = "".join(map(chr, [*range(1, 0x200), 0x1F680]))
  ((letters, _),) = decode.pre_tokenize_str(text)
  assert [vocabulary.tokens.index(letter) for letter in letters] == [byte + 3 for byte in text.encode()]
  assert len(set(vocabulary.tokens)) == 264 and all(len(half) > 1 for half in vocabulary.merges[0].split(" "))
  assert vocabulary.types == [CONTROL] * 3 + [NORMAL] * 256 + [UNUSED] * 5
  assert (vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.add_bos) == (0, 1, 2, True)


@pytest.mark.parametrize(
  ("name", "sentence"),
  [
    ("unigram", "no SentencePiece BPE with bytes"),
    ("bare", "no SentencePiece BPE with bytes"),
    ("nfkc", r"normalises text \(nmt_nfkc\), which llama.cpp does not"),
    ("partial", "merges of .* are not those of a SentencePiece model"),
    ("shuffled", "merges of .* are not those of a SentencePiece model"),
    ("other", "cuts text in a way that is not known here: only as gpt-2, llama-bpe, qwen2 do"),
  ],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(name, sentence, folders):
  with pytest.raises(UserError, match=sentence):
    read_vocabulary(str(folders / name), 350)


def test_a_vocabulary_of_another_model_is_refused_and_added_tokens_without_a_row_are_left_out(folders):
  name = str(folders / "sentencepiece")
  whole, without = (dataclasses.asdict(read_vocabulary(name, rows)) for rows in (342, 341))
  shorter = {key: value[:341] for key, value in whole.items() if key in ("tokens", "types", "scores")}
  assert without == whole | shorter
  with pytest.raises(UserError, match=r"has 340 ids and the model embeds 339: it is another model's"):
    read_vocabulary(name, 339)
  with pytest.raises(UserError, match=r"has 259 ids and the model embeds 97"):
    read_vocabulary("bytes", 97)
