"""Formats of files: the same documents from each, what is damaged, and properties over generated files."""

import dataclasses
import functools
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from etils import epath
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.data.conftest import documents_of, settings
from tsparse.data import check_data, formats, sources, train_iterator
from tsparse.data.encoding import BYTES, load_tokenizer, make_encoder
from tsparse.data.sources import read_documents
from tsparse.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("TSPARSE_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def write(path, texts, field="text"):
  """The texts in the format that the path's name says; in .jsonl and .parquet beside another field."""
  records = [{"id": i, field: text} for i, text in enumerate(texts)]
  lines = "".join(json.dumps(record) + "\n" for record in records).encode()
  if path.name.endswith(".parquet"):
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
  else:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(lines))
  return path


def texts_of(documents):
  return [documents.read(i).decode() for i in range(len(documents))]


TEXTS = ["one", "two\nlines", "", "naïve 日本語 🙂", " \n ", "x" * 5000, "\\u0041 \t end", "last"]
WRITTEN = [text for text in TEXTS if text.strip()]
STRUCTURED = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


@pytest.mark.parametrize("suffix", STRUCTURED)
def test_every_format_gives_the_same_documents(suffix, tmp_path, cache):
  documents = read_documents(str(write(tmp_path / f"d{suffix}", TEXTS, "body")), "body")
  assert texts_of(documents) == WRITTEN and documents.skipped == 2
  plain = read_documents(str(write(tmp_path / "plain.jsonl", TEXTS)))
  assert documents.fingerprint() == plain.fingerprint()
  made = sorted(path.suffix for path in cache.iterdir()) if cache.exists() else []
  assert made == ([] if suffix == ".jsonl" else [".npz", ".texts"])


def test_packed_files_are_unpacked_once_and_again_when_they_change(tmp_path, cache, caplog):
  path = write(tmp_path / "d.jsonl.gz", TEXTS)
  read_documents(str(path))
  assert "Unpacked" in caplog.text and " MB)" in caplog.text
  before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
  sources._documents.cache_clear()  # as a new process has it
  assert texts_of(read_documents(str(path))) == WRITTEN
  assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == before
  write(path, ["other"])
  assert texts_of(read_documents(str(path))) == ["other"]


def test_the_index_of_a_large_file_is_kept(tmp_path, cache, monkeypatch):
  monkeypatch.setattr(sources, "KEPT_BYTES", 1000)
  path = write(tmp_path / "d.jsonl", TEXTS)
  first = read_documents(str(path))
  sources._documents.cache_clear()
  monkeypatch.setattr(formats, "read_items", None)  # it is not read a second time
  again = read_documents(str(path))
  assert texts_of(again) == texts_of(first) == WRITTEN and again.skipped == first.skipped
  assert again.files[0].path == str(path)


def test_batches_are_the_same_from_every_format(tmp_path):
  texts = [f"document {i} " + "y" * (i % 40) for i in range(60)]
  batches = []
  for suffix in STRUCTURED:
    data = settings(write(tmp_path / f"t{suffix}", texts, "body"), text_field="body")
    check_data(data, 259)
    iterator = train_iterator(data, seq_len=32, batch_size=4, seed=1)
    batches.append([next(iterator)["targets"] for _ in range(100)])
  assert all(np.array_equal(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is damaged"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:-20], "a.jsonl.gz is damaged"),
    ("a.jsonl.zst", b"no zstd", "a.jsonl.zst is damaged"),
    ("a.parquet", b"no parquet", "a.parquet is damaged"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"\n', mtime=0), "a.jsonl.gz:2 is not JSON"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz holds no text"),
    ("a.txt", b"\xff", "a.txt is not UTF-8 at byte 0"),
  ],
)
def test_a_damaged_file_is_one_sentence_and_leaves_nothing(name, content, message, tmp_path, cache):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_documents(str(tmp_path / name))
  assert "holds no text" in message or not cache.exists() or not list(cache.iterdir())


def test_a_column_that_is_no_text_is_named(tmp_path):
  path = str(write(tmp_path / "a.parquet", TEXTS))
  with pytest.raises(UserError, match="no column 'body', only id, text"):
    read_documents(path, "body")
  with pytest.raises(UserError, match="'id' of .* holds int64, not text"):
    read_documents(path, "id")
  pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "null.parquet")
  with pytest.raises(UserError, match="Row 2 of .*null.parquet has no 'text'"):
    read_documents(str(tmp_path / "null.parquet"))
  documents = read_documents(str(tmp_path / "null.parquet"), skip_bad=1)
  assert texts_of(documents) == ["a", "b"] and documents.bad == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_so_many_malformed_lines_are_left_out_and_counted(suffix, tmp_path, caplog):
  lines = b'{"text": "a"}\nno json\n{"body": 1}\n\n{"text": "b"}\n{"text": "\xff"}\n'
  path = tmp_path / f"d{suffix}"
  path.write_bytes(gzip.compress(lines, mtime=0) if suffix.endswith("gz") else lines)
  documents = read_documents(str(path), skip_bad=3)
  assert texts_of(documents) == ["a", "b"] and (documents.bad, documents.skipped) == (3, 1)
  assert "1 blank lines or empty documents and 3 malformed lines of 6" in caplog.text
  for tolerated, line in ((0, 2), (1, 3), (2, 6)):  # with an index in the cache, too
    with pytest.raises(UserError, match=f"{path.name}:{line} "):
      read_documents(str(path), skip_bad=tolerated)
  folder = tmp_path / "folder"
  folder.mkdir()
  for name in ("x", "y"):
    (folder / f"{name}.jsonl").write_bytes(lines)
  with pytest.raises(UserError, match="y.jsonl:3 .* 4 malformed lines before it"):
    read_documents(str(folder), skip_bad=4)  # over all files together


def packed(path, lines, each):
  """Writes the lines in members or frames of `each` bytes; of a .parquet, in groups of 3 rows."""
  if path.suffix == ".parquet":
    return write(path, [json.loads(line)["text"] for line in lines.split(b"\n") if line])
  pack = {".gz": functools.partial(gzip.compress, mtime=0), ".zst": zstandard.ZstdCompressor().compress}.get(
    path.suffix
  )
  path.write_bytes(b"".join(pack(lines[i : i + each]) for i in range(0, len(lines), each)) if pack else lines)
  return path


@pytest.mark.parametrize("skip_bad", [0, 5])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("each", [72, 50])  # bytes of a frame: four whole lines, and not
def test_a_file_that_is_cut_off_anywhere_is_an_error_or_ends_with_a_whole_line(suffix, each, skip_bad, tmp_path):
  texts = [f"text{i}" for i in range(9)]
  lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
  whole = packed(tmp_path / f"whole{suffix}", lines, each).read_bytes()
  # Cuts after which nothing tells that there was more: between two lines that are between frames.
  ends = {} if suffix == ".parquet" else {
    packed(tmp_path / f"end{suffix}", lines[:size], each).stat().st_size: size // 18
    for size in range(0, len(lines), 18) if suffix == ".jsonl" or size % each == 0
  }  # fmt: skip
  if suffix == ".jsonl":
    ends |= {size - 1: count for size, count in ends.items() if size} | {len(lines) - 1: 9}  # the newline is no text
  for size in range(1, len(whole), 1 if suffix != ".parquet" else 7):
    path = tmp_path / f"{size}{suffix}"
    path.write_bytes(whole[:size])
    try:
      found = texts_of(read_documents(str(path), skip_bad=skip_bad))
    except UserError as e:
      assert path.name in str(e) and "\n" not in str(e) and size not in ends, (size, str(e))
    else:
      assert found == texts[: ends.get(size, 0)], size


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n') + b"garbage", "a.jsonl.zst is damaged"),
    ("a.jsonl.zst", bytes([*zstandard.compress(b"a" * 99)[:5], 98, *zstandard.compress(b"a" * 99)[6:]]), "is damaged"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0) + b"garbage", "a.jsonl.gz is damaged"),
    ("a.jsonl", b'{"text": "a"}\n\0\0\0', "a.jsonl is cut off: line 2"),
    ("a.txt", "naïve 日本".encode()[:-1], "a.txt is cut off"),
    ("a.jsonl.zst", b"", "holds no text"),
  ],
)
def test_damage_is_never_a_malformed_line(name, content, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_documents(str(tmp_path / name), skip_bad=9)


def test_frames_with_no_text_between_those_with_some_are_passed_over(tmp_path):
  skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # as pzstd and the seekable format write
  frames = [
    zstandard.compress(b'{"text": "a"}\n{"te'),
    skipped,
    zstandard.compress(b""),
    zstandard.compress(b'xt": "b"}'),
  ]
  (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames) + skipped)
  assert texts_of(read_documents(str(tmp_path / "a.jsonl.zst"))) == ["a", "b"]


@pytest.mark.parametrize("change", [lambda p: p.write_text(p.read_text() + "\n"), lambda p: os.utime(p, (1, 1))])
def test_a_file_that_changes_while_it_is_read_is_an_error(change, tmp_path):
  path = write(tmp_path / "d.jsonl", TEXTS)
  documents = read_documents(str(path))
  documents.read(0)
  change(path)
  with pytest.raises(UserError, match="changed while it was being read"):
    documents.read(0)
  path.unlink()
  with pytest.raises(UserError, match="any more"):
    documents.read(0)


def test_a_bucket_is_read_through_epath_and_unpacked(tmp_path, monkeypatch, cache):
  write(tmp_path / "d.jsonl", TEXTS)
  here = epath.Path
  monkeypatch.setattr(epath, "Path", lambda path: here(str(path).replace("s3://bucket", str(tmp_path))))
  documents = read_documents("s3://bucket/d.jsonl")
  assert texts_of(documents) == WRITTEN and str(cache) in documents.files[0].path


# Properties over generated files.

json_texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=12)


@limits(max_examples=30, deadline=None)
@given(json_texts, st.sampled_from(STRUCTURED), st.integers(1, 4), st.integers(1, 9))
def test_no_text_is_lost_between_a_file_and_the_rows(texts, suffix, lanes, seq_len):
  expected = [text for text in texts if text and not text.encode().isspace()]
  with tempfile.TemporaryDirectory() as folder:
    path = write(Path(folder) / f"d{suffix}", texts)
    if not expected:
      with pytest.raises(UserError, match="holds no text"):
        read_documents(str(path), cache=folder)
      return
    documents = read_documents(str(path), cache=folder)
    assert texts_of(documents) == expected
    data = settings(path, cache=folder, lanes=lanes)
    whole = sum(len(text.encode()) + 1 for text in expected)
    held_out = documents.crc % 20 == 0
    kept = expected if held_out.all() else [text for text, out in zip(expected, held_out, strict=True) if not out]
    iterator = train_iterator(data, seq_len=seq_len, batch_size=lanes, seed=0)
    batches = [next(iterator) for _ in range(-(-whole // seq_len) + 1)]
    sequence = [documents_of([{k: v[lane : lane + 1] for k, v in b.items()} for b in batches]) for lane in range(lanes)]
    drawn = [sequence[place % lanes][place // lanes].decode() for place in range(len(kept))]
    assert sorted(drawn) == sorted(kept)  # the first epoch, over all lanes


@limits(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_documents_or_one_sentence(content):
  with tempfile.TemporaryDirectory() as folder:
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
      path = Path(folder) / name
      path.write_bytes(content)
      try:
        documents = read_documents(str(path), cache=folder)
        assert len(documents) and all(texts_of(documents))
      except UserError as e:
        assert name in str(e)


@limits(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.integers(2, 40))
def test_pieces_of_a_document_are_its_tokens(text, size):
  encoder = make_encoder(BYTES, True, 1)
  encoder = dataclasses.replace(encoder, size=size)
  got, place = [], 0
  while place < len(text) or not got:
    tokens, _, place = encoder.piece(text, place)
    got += tokens.tolist()
    assert len(tokens) <= 4 * size + 1
  assert got == [*BYTES.encode(text).tolist(), 1]


@pytest.mark.parametrize("name", ["stories260k/tokenizer.model", "tokenizers/mistral_v1.model"])
def test_pieces_of_real_text_are_the_tokens_of_the_whole(name, shared_data):
  tokenizer = load_tokenizer(str(shared_data / name))
  text = json.loads((shared_data / "books/valid.jsonl").read_text().splitlines()[0])["text"]
  encoder = make_encoder(tokenizer, True, 1)
  assert encoder.own_space
  encoder = dataclasses.replace(encoder, size=2000)
  got, place, pieces = [], 0, 0
  while place < len(text):
    tokens, _, place = encoder.piece(text, place)
    got, pieces = got + tokens.tolist(), pieces + 1
  assert pieces > 20 and got == [*tokenizer.encode(text), tokenizer.eos]


def test_a_gigantic_document_is_drawn_in_pieces_and_none_of_it_is_lost(tmp_path):
  words = " ".join(f"word{i}" for i in range(200_000))  # 2 MB
  (tmp_path / "big.txt").write_text(words)
  iterator = train_iterator(settings(tmp_path / "big.txt"), seq_len=4096, batch_size=8, seed=0)
  batches = [next(iterator) for _ in range(len(words) // (8 * 4096) + 1)]
  restored = train_iterator(settings(tmp_path / "big.txt"), seq_len=4096, batch_size=8, seed=0)
  state = iterator.state()
  assert len(state) < 300_000
  restored.restore(state)
  batches += [next(restored) for _ in range(2)]
  assert documents_of(batches)[0].decode() == words


def test_reading_imports_what_a_format_needs_and_no_more():
  code = "import sys, tsparse.data; print({'pyarrow', 'zstandard', 'tensorflow', 'jax'} & {*sys.modules})"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"
