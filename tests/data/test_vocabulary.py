"""Ids against the libraries they are to equal: transformers, tokenizers, sentencepiece."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from tests.conftest import ENVIRONMENT
from tests.data.conftest import settings
from tsparse.data import bos_id, load_vocabulary, same_vocabulary, train_iterator
from tsparse.data.encoding import BYTES, first_token, load_tokenizer, tokenizer_digest
from tsparse.data.tensorflow import load_tensorflow
from tsparse.errors import UserError

transformers.logging.set_verbosity_error()

# What tokenizers differ in: spaces at the ends and in runs, new lines, bytes of what is in no vocabulary, controls.
ODD = ["", " ", "hello", " hello", "  two  spaces ", "\n", "a\n\n\tb\r\n", "\x00\x07\x1b", "<0x41>", "▁a ▁"]
ODD += ["naïve 🎉👩‍🚀 漢字 ꙮ"]
SPELLED = ["<s>a</s> b", "a <unk> b", "<unk>", "</s></s> ", "<S> < s>"]
CHATML = "<|im_start|>user\nHi  there, Lily!<|im_end|>\n<|im_start|>assistant\n"


def real_texts(folder: Path) -> list[str]:
  """A few hundred lines of stories, pages, code, sums and Wikipedia, the last with many an `<unk>`."""
  texts = []
  for name in ("tinystories/valid_v2", "web/train", "code/train", "math/train"):
    with open(folder / f"{name}.jsonl", encoding="utf-8") as f:
      texts += [json.loads(next(f))["text"][:2000] for _ in range(60)]
  with open(folder / "wiki/valid.jsonl", encoding="utf-8") as f:
    wiki = json.loads(next(f))["text"]
  return texts + [wiki[i : i + 1000] for i in range(0, 60000, 1000)]


@pytest.fixture(params=["tokenizers/mistral_v1.model", "stories260k/tokenizer.model"])
def model(request, shared_data) -> Path:
  return shared_data / request.param


def published_json(model: Path) -> Tokenizer:
  """The tokenizer.json that is published with such a model (transformers 5.23's own converter of BPE fails)."""
  pieces = ModelProto.FromString(model.read_bytes()).pieces
  vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
  merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL})
  made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  made.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
  return made


def byte_level(*added: str) -> Tokenizer:
  """A tokenizer.json such as Qwen's and Llama 3's, of a few words; `added` come after them."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
  made.train_from_iterator([__doc__, real_texts.__doc__, published_json.__doc__], trainer)
  made.add_special_tokens([AddedToken(token, normalized=False) for token in added])
  return made


def write(folder: Path, **jsons) -> str:
  """Writes `tokenizer_config={...}` as tokenizer_config.json and so on; returns the folder."""
  folder.mkdir(exist_ok=True)
  for name, content in jsons.items():
    text = content.to_str() if isinstance(content, Tokenizer) else json.dumps(content)
    (folder / f"{name}.json").write_text(text)
  return str(folder)


def through_tensorflow(vocabulary, text: str) -> list[int]:
  _, tf = load_tensorflow()
  eager = vocabulary.encode_tf(tf.constant(text.encode())).numpy().tolist()
  assert tf.function(vocabulary.encode_tf)(tf.constant(text.encode())).numpy().tolist() == eager
  return eager


def test_sentencepiece_models_give_sentencepieces_ids(model, shared_data):
  vocabulary, own = load_vocabulary(str(model)), SentencePieceProcessor(model_file=str(model))
  texts = [text.replace("<unk>", "unk") for text in real_texts(shared_data)]
  assert len(texts) == 300
  for text in ODD + texts:
    assert vocabulary.encode(text) == own.encode(text)
    assert vocabulary.decode(own.encode(text)) == own.decode(own.encode(text))
  for text in ODD:
    assert through_tensorflow(vocabulary, text) == own.encode(text)
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0)
  assert vocabulary.vocab_size == own.vocab_size()


def test_a_tokenizer_json_and_its_sentencepiece_model_give_transformers_ids(model, shared_data, tmp_path):
  folder = write(tmp_path, tokenizer=published_json(model), tokenizer_config={"eos_token": "</s>"})
  theirs = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
  ours, of_model = load_vocabulary(f"{folder}/tokenizer.json"), load_vocabulary(str(model))
  for text in ODD + SPELLED + real_texts(shared_data):
    expected = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == expected
    assert of_model.encode(text) == expected
  for text in ODD + SPELLED:
    assert through_tensorflow(ours, text) == ours.encode(text)
  assert ours.encode("a<unk>") == [*ours.encode("a"), 0]
  assert same_vocabulary(ours, of_model) and same_vocabulary(of_model, ours)
  assert bos_id(ours) == 1 and ours.eos_id == 2  # BOS as the post-processor has it


def test_the_model_in_the_shared_folder_has_the_ids_of_llama_tokenizer(shared_data):
  # transformers 5.23 reads a lone tokenizer.model unlike SentencePiece: LlamaTokenizer drops a space in front,
  # AutoTokenizer has no leading space at all, and both give Mistral's runs of spaces other ids.
  folder = str(shared_data / "stories260k")
  ours, theirs = load_vocabulary(folder), LlamaTokenizer.from_pretrained(folder)
  texts = [text for text in real_texts(shared_data) if not text.startswith(" ") and "<unk>" not in text]
  assert len(texts) > 200
  for text in texts:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
  assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_a_byte_level_tokenizer_has_transformers_ids_and_round_trips(shared_data, tmp_path):
  folder = write(tmp_path, tokenizer=byte_level("<|endoftext|>"), tokenizer_config={"eos_token": "<|endoftext|>"})
  ours = load_vocabulary(folder)
  theirs = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
  for text in ODD + real_texts(shared_data):
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == text
  assert ours.encode("a<|endoftext|>b") == [*ours.encode("a"), ours.eos_id, *ours.encode("b")]
  assert ours.decode([*ours.encode("a"), ours.eos_id, *ours.encode("b")]) == "a"
  assert ours.vocab_size == len(theirs)


def added_token(content):
  return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


# The ways in which a folder says that <|im_end|> is 32000 and <|im_start|> 32001, as TurboSparse-Mistral's does.
IDS = {"<|im_end|>": 32000, "<|im_start|>": 32001}
DECODER = {"added_tokens_decoder": {str(i): {**added_token(token), "special": True} for token, i in IDS.items()}}
DECLARATIONS = {
  "added_tokens.json": {"added_tokens": IDS},
  "tokenizer_config.json": {"tokenizer_config": DECODER},
  "both": {"added_tokens": IDS, "tokenizer_config": DECODER},
}


@pytest.mark.parametrize("declared", DECLARATIONS)
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_chatml_tokens_have_their_ids(kind, declared, mistral, tmp_path):
  files = {"special_tokens_map": {"eos_token": added_token("<|im_end|>"), "bos_token": "<s>"}, **DECLARATIONS[declared]}
  if kind == "tokenizer.model":
    shutil.copyfile(mistral, tmp_path / kind)
  else:
    files["tokenizer"] = published_json(Path(mistral))
  ours = load_vocabulary(write(tmp_path, **files))
  assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 32000, 32002)
  reference = published_json(Path(mistral))
  reference.add_special_tokens(list(IDS))
  for text in [CHATML, "a<|im_end|> b", " <|im_start|>", *ODD, *SPELLED]:
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids == through_tensorflow(ours, text)
  assert [i for i in ours.encode(CHATML) if i >= 32000] == [32001, 32000, 32001]
  assert ours.decode(ours.encode("<|im_start|>")) == "<|im_start|>"
  assert ours.decode(ours.encode(CHATML)).endswith("Hi  there, Lily!")  # up to the first EOS, which is <|im_end|>


def test_a_mistral_folder_has_the_ids_of_auto_tokenizer(mistral, shared_data, tmp_path):
  made = published_json(Path(mistral))
  made.add_special_tokens([AddedToken(token, normalized=False) for token in IDS])
  shutil.copyfile(mistral, tmp_path / "tokenizer.model")
  config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
  folder = write(tmp_path, tokenizer=made, tokenizer_config=config, config={"model_type": "mistral", "eos_token_id": 2})
  theirs = AutoTokenizer.from_pretrained(folder)
  # the folder means tokenizer.json; of the model, named itself, tokenizer.json tells the added tokens
  for ours in (load_vocabulary(folder), load_vocabulary(f"{folder}/tokenizer.model")):
    assert (bos_id(ours), ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in [CHATML, *ODD, *SPELLED, *real_texts(shared_data)[::5]]:
      assert [bos_id(ours), *ours.encode(text)] == theirs.encode(text)


def test_a_sentencepiece_chat_round_trips(mistral, tmp_path):
  shutil.copyfile(mistral, tmp_path / "tokenizer.model")
  vocabulary = load_vocabulary(write(tmp_path, added_tokens=IDS))  # EOS is the model's own
  ids = vocabulary.encode(CHATML)
  assert vocabulary.decode([1, *ids, 2]) == CHATML
  _, tf = load_tensorflow()
  assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [CHATML.encode()] * 2
  assert vocabulary.decode([*vocabulary.encode("a"), 32500]) == "a<unk>"  # an id of the embedding without a token


def test_white_space_that_an_added_token_swallows(mistral, tmp_path):
  flags = {"<mask>": {"lstrip": True}, "<end>": {"rstrip": True}, "[x]": {"single_word": True}, "<en": {}}
  decoder = {str(32000 + i): {**added_token(token), **flags[token]} for i, token in enumerate(flags)}
  shutil.copyfile(mistral, tmp_path / "tokenizer.model")
  ours = load_vocabulary(write(tmp_path, tokenizer_config={"added_tokens_decoder": decoder}))
  reference = published_json(Path(mistral))
  reference.add_tokens([AddedToken(token, normalized=False, **flags[token]) for token in flags])
  for text in ["a  <mask> b", "a <end>  b", "<en d", "a[x] [x]b", "a [x] b", " <mask><end> ", "<end>\n<mask>"]:
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
  "files, bos, eos",
  [
    ({"tokenizer_config": {"bos_token": "<b>", "eos_token": {"content": "<e>"}}}, 300, 301),
    (
      {
        "tokenizer_config": {"bos_token": None, "eos_token": "<e>"},
        "special_tokens_map": {"bos_token": {"content": "<b>"}, "eos_token": "<x>"},
        "config": {"bos_token_id": 0},
      },
      300,
      301,
    ),
    ({"config": {"bos_token_id": 300, "eos_token_id": [301, 302]}, "generation_config": {"eos_token_id": 0}}, 300, 301),
    ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": 301}}, 301, 301),  # no BOS: EOS
  ],
)
def test_bos_and_eos_of_a_tokenizer_json_come_from_the_files_beside_it(files, bos, eos, tmp_path):
  made = byte_level("<b>", "<e>", "<x>")

  assert made.token_to_id("<b>") == 300 and made.token_to_id("<x>") == 302
  vocabulary = load_vocabulary(write(tmp_path, tokenizer=made, **files))
  assert (bos_id(vocabulary), vocabulary.eos_id) == (bos, eos)


def test_the_post_processor_names_bos_and_eos_before_the_models_config_does(tmp_path):
  made = byte_level("<b>", "<e>")
  ends = [(token, made.token_to_id(token)) for token in ("<b>", "<e>")]
  made.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=ends)
  vocabulary = load_vocabulary(write(tmp_path, tokenizer=made, config={"bos_token_id": 0, "eos_token_id": 0}))
  assert [(token, i) for token, i in zip(("<b>", "<e>"), (bos_id(vocabulary), vocabulary.eos_id), strict=True)] == ends
  assert len(vocabulary.encode("a")) == 1  # the packer adds BOS and the task EOS


def framed(tokenizer: Tokenizer, first: str) -> Tokenizer:
  """The tokenizer with a post-processor that puts a token before texts."""
  ids = [(first, tokenizer.token_to_id(first))]
  tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A", f"{first} $A $B", special_tokens=ids)
  return tokenizer


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize(
  "kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GPTNeoXTokenizerFast", "Qwen2Tokenizer"]
)
@pytest.mark.parametrize("puts", [True, False])
def test_bos_stands_before_a_text_where_auto_tokenizer_puts_it(puts, kind, given, tmp_path):
  made = byte_level("<b>", "<e>")
  config = {"bos_token": "<b>", "eos_token": "<e>", "tokenizer_class": kind}
  config |= {} if given is None else {"add_bos_token": given}
  folder = write(tmp_path, tokenizer=framed(made, "<b>") if puts else made, tokenizer_config=config)
  ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
  first = first_token(ours, "auto")
  assert theirs("a cat").input_ids == [*([] if first is None else [first]), *ours.encode("a cat")]
  assert (first_token(ours, "on"), first_token(ours, "off")) == (300, None)


def test_bos_before_texts_of_a_sentencepiece_model_is_as_the_file_beside_it_says(model, tmp_path):
  shutil.copy(model, tmp_path / "tokenizer.model")
  for given, first in ((True, 1), (False, None), (None, 1)):  # as such models are trained, where nothing is said
    write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": given})
    assert first_token(load_tokenizer(str(tmp_path)), "auto") == first
    if given is not None:
      assert (AutoTokenizer.from_pretrained(tmp_path)("a cat").input_ids[:1] == [1]) == given
  write(tmp_path, tokenizer_config={"bos_token": "", "eos_token": "</s>"})  # an empty one is none: the model's own
  assert load_tokenizer(str(tmp_path)).bos == 1


def test_a_tokenizer_without_bos_puts_none_and_eos_where_it_is_asked_for(tmp_path):
  tokenizer = load_tokenizer(write(tmp_path, tokenizer=byte_level("<e>"), tokenizer_config={"eos_token": "<e>"}))
  assert [first_token(tokenizer, bos) for bos in ("auto", "off", "on")] == [None, None, tokenizer.eos]
  assert [first_token(BYTES, bos) for bos in ("auto", "off", "on")] == [0, None, 0]


def test_a_tokenizer_json_that_asks_for_truncation_and_padding_gives_all_ids(tmp_path):
  made = byte_level("<e>")
  expected = made.encode("a b c d e f").ids
  made.enable_truncation(2)
  made.enable_padding(length=64)
  vocabulary = load_vocabulary(write(tmp_path, tokenizer=made, tokenizer_config={"eos_token": "<e>"}))
  assert vocabulary.encode("a b c d e f") == expected


def test_tasks_with_a_tokenizer_json_end_in_eos_and_continue_where_they_were(tmp_path, jsonl):
  made = byte_level("<b>", "<e>")
  vocabulary = write(tmp_path / "tok", tokenizer=made, tokenizer_config={"bos_token": "<b>", "eos_token": "<e>"})
  data = settings(jsonl, vocabulary=vocabulary)
  arguments = dict(seq_len=64, batch_size=4, seed=0)
  iterator = train_iterator(data, **arguments)
  first = next(iterator)
  starts = first["positions"] == 0
  bos, eos = made.token_to_id("<b>"), made.token_to_id("<e>")
  assert set(first["inputs"][starts][1:]) <= {bos, *first["inputs"][:, 0]}
  ends = first["targets"][:, :-1][starts[:, 1:]]
  assert len(ends) and (ends == eos).all()
  state, expected = iterator.state(), next(iterator)
  resumed = train_iterator(data, **arguments)
  resumed.restore(state)
  np.testing.assert_array_equal(next(resumed)["targets"], expected["targets"])


def test_the_digest_is_of_the_content_and_of_what_the_files_beside_it_say(mistral, tmp_path):
  shutil.copyfile(mistral, tmp_path / "copy.model")
  assert tokenizer_digest(str(tmp_path / "copy.model")) == tokenizer_digest(mistral)
  plain = load_vocabulary(str(tmp_path / "copy.model"))
  assert plain == load_vocabulary(mistral)
  write(tmp_path, added_tokens=IDS)
  assert tokenizer_digest(str(tmp_path / "copy.model")) != tokenizer_digest(mistral)
  assert not same_vocabulary(load_vocabulary(str(tmp_path / "copy.model")), plain)
  seqio, _ = load_tensorflow()
  assert same_vocabulary(seqio.SentencePieceVocabulary(mistral), plain)
  assert not same_vocabulary(seqio.ByteVocabulary(), plain)


@pytest.mark.parametrize(
  "files, message",
  [
    ({}, "folder without tokenizer.json or tokenizer.model"),
    ({"tokenizer": "{"}, "not a tokenizer.json"),
    ({"tokenizer": {"model": {}}}, "not a tokenizer.json"),
    ({"tokenizer": byte_level}, "has no EOS"),
    ({"tokenizer": byte_level, "tokenizer_config": {"eos_token": "<e>"}}, "name '<e>' as EOS, which it does not hold"),
    ({"tokenizer": byte_level, "config": {"eos_token_id": 5000}}, "name 5000 as EOS, which it does not hold"),
    ({"tokenizer": byte_level, "added_tokens": {"<e>": 9000}}, "'<e>' the id 9000, and it can only be 300"),
    ({"tokenizer": byte_level, "added_tokens": {"<e>": "x"}}, "not laid out as transformers writes it"),
    ({"tokenizer": byte_level, "tokenizer_config": []}, "is not a JSON object"),
  ],
)
def test_what_cannot_be_a_tokenizer_is_an_error_of_one_sentence(files, message, tmp_path):
  folder = write(tmp_path, **{name: content() if callable(content) else content for name, content in files.items()})
  with pytest.raises(UserError, match=message) as error:
    load_vocabulary(folder)
  assert "\n" not in str(error.value)


def test_a_damaged_file_is_an_error(mistral, tmp_path):
  shutil.copyfile(mistral, tmp_path / "tokenizer.model")
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ')
  with pytest.raises(UserError, match="tokenizer_config.json cannot be read"):
    load_vocabulary(str(tmp_path))
  for content in (b"", Path(mistral).read_bytes()[:1000]):
    (tmp_path / "t.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="not a SentencePiece model"):
      load_vocabulary(str(tmp_path / "t.model"))


def test_importing_the_data_package_imports_no_tokenizer():
  heavy = {"tokenizers", "sentencepiece", "tensorflow", "seqio"}
  code = f"import sys, tsparse.data; print({heavy} & {{*sys.modules}})"
  done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"
