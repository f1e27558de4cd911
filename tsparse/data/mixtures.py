"""Mixtures, declared: what each is made of, in which shares, and where to get it. Nothing is read or imported here.

A weight is a share of TOKENS: of all tokens that a run draws, so many (of the sum of the weights) are of this source.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Declared:
  """A source of a mixture.

  Attributes:
    name: of the source, and of its file or folder under `config.data.root` unless `files` says another.
    category: that the source belongs to.
    weight: share of the tokens, relative to the other sources.
    get: where to get it, and its licence.
    field: that holds the text in .jsonl and .parquet files, or of a TFDS dataset.
    files: path under the root.
    validation: path under the root of held-out documents; "" for one document in 20 of `files`.
    tfds: NAME:VERSION of the TensorFlow Datasets dataset that it is, read where there are no files.
    format: "text", or "chat" for conversations (`chat`), of which the assistant's turns count in the loss.
  """

  name: str
  category: str
  weight: float
  get: str
  field: str = "text"
  files: str = ""
  validation: str = ""
  tfds: str = ""
  format: str = "text"


PILE = "of the Pile, EleutherAI/pile (the collection is MIT, its texts have their own licences)"
REDPAJAMA = "of RedPajama, togethercomputer/RedPajama-Data-1T"
PROOF_PILE = "of Proof-Pile-2, EleutherAI/proof-pile-2 on the Hugging Face hub"
STARCODER = "of StarCoderData, bigcode/starcoderdata on the Hugging Face hub (accept its terms there)"
# Table 4 of Turbo Sparse (arXiv 2406.05955), in percent; they add up to 100.00. Its cell "Pile-Arxiv, Pile-PubMed,
# Pile-Philpapers" has one number: how it is split among the three is not printed, so that they are one source here.
TURBOSPARSE_150B = (
  Declared("pile_academic", "academic", 2.69, f"the ArXiv, PubMed and PhilPapers subsets {PILE}"),
  Declared("dolma_pes2o", "academic", 7.83, "peS2o of Dolma, allenai/dolma on the Hugging Face hub (ODC-BY)"),
  Declared("wanjuan_cc", "web", 73.55, "WanJuan-CC, OpenDataLab/WanJuan-CC (CC BY 4.0)"),
  Declared("redpajama_wiki", "web", 0.65, f"the wikipedia subset {REDPAJAMA} (CC BY-SA)"),
  Declared("pile_openwebtext2", "web", 0.44, f"the OpenWebText2 subset {PILE}"),
  Declared("redpajama_books", "books", 6.54, f"the book subset {REDPAJAMA} (withdrawn there: bring your own copy)"),
  Declared(
    "pile_pg19",
    "books",
    0.37,
    "PG-19, deepmind/pg19, by `tfds build pg19` (public domain)",
    "book_text",
    tfds="pg19:0.1.1",
  ),
  Declared("open_web_math", "math", 1.46, "OpenWebMath, open-web-math/open-web-math on the Hugging Face hub (ODC-BY)"),
  Declared("proof_pile_2", "math", 0.76, f"the arxiv subset {PROOF_PILE} (the two others are sources of their own)"),
  Declared("algebraic_stack", "math", 0.54, f"the algebraic-stack subset {PROOF_PILE} (permissively licensed code)"),
  Declared("starcoder_java", "code", 0.77, f"java {STARCODER}", "content"),
  Declared("starcoder_csharp", "code", 0.74, f"c-sharp {STARCODER}", "content"),
  Declared("starcoder_typescript", "code", 0.52, f"typescript {STARCODER}", "content"),
  Declared("starcoder_remaining", "code", 1.73, f"all other languages {STARCODER}", "content"),
  Declared(
    "github_code", "code", 1.41, "codeparrot/github-code on the Hugging Face hub (licences by repository)", "code"
  ),
)

TEST_DATA = "the project's folder of test data"
# A small mixture of the same kind, for tests and trials. The weights are nobody's recipe.
STORIES_MIXTURE = (
  Declared("c4_pages", "web", 0.3, f"1,000 pages of C4 (ODC-BY), {TEST_DATA}", files="web/train.jsonl"),
  Declared("wikitext", "wiki", 0.1, f"WikiText-2 (CC BY-SA), {TEST_DATA}", files="wiki/valid.jsonl"),
  Declared(
    "shakespeare", "books", 0.1, f"plays (public domain), {TEST_DATA}", files="books/train.jsonl",
    validation="books/valid.jsonl",
  ),
  Declared("gsm8k", "math", 0.1, f"GSM8K (MIT), {TEST_DATA}", files="math/train.jsonl"),
  Declared("code_answers", "code", 0.1, f"code answers (CC BY-NC), {TEST_DATA}", files="code/train.jsonl"),
  Declared(
    "tinystories", "stories", 0.3, f"TinyStories (CDLA-Sharing), {TEST_DATA}", files="tinystories/train.jsonl",
    validation="tinystories/valid_v2.jsonl",
  ),
)  # fmt: skip

# What the paper names of its SFT data ("including"); the weights are not printed: equal ones are taken.
MESSAGES = 'as lines of {"messages": [{"role", "content"}, ...]}'
TURBOSPARSE_SFT = (
  Declared(
    "orca_math", "chat", 0.5, "microsoft/orca-math-word-problems-200k on the Hugging Face hub (MIT), its question and "
    f"answer {MESSAGES}", format="chat",
  ),
  Declared("bagel", "chat", 0.5, f"the SFT part of jondurbin/bagel on GitHub, {MESSAGES}", format="chat"),
)  # fmt: skip

STORIES_SFT = (
  Declared(
    "instructions", "chat", 1.0, f"instructions (CC BY-NC), {TEST_DATA}", files="sft/train.jsonl", format="chat"
  ),
)

MIXTURES = {
  "turbosparse_150b": TURBOSPARSE_150B,
  "turbosparse_sft": TURBOSPARSE_SFT,
  "stories_mixture": STORIES_MIXTURE,
  "stories_sft": STORIES_SFT,
}
