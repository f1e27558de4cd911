import os

import numpy as np
import pytest

from tsparse.data.sources import held_out_splits, read_documents
from tsparse.errors import UserError


def test_documents_are_read_by_number(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(
    '{"text": "é\\n\\u00e8 "}\n  \n{"id": 1, "text": "two\\u0000"}\r\n{"text": ""}\n{"text": "last"}'.encode()
  )
  documents = read_documents(str(path))
  assert [documents.read(i) for i in (2, 0, 1)] == [b"last", "é\nè ".encode(), b"two\0"]
  assert documents.skipped == 2


def test_a_folder_is_all_its_files_in_order(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub/c.txt").write_text("c\n\nc")
  (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "notes.md").write_text("no")
  documents = read_documents(str(tmp_path))
  assert [documents.read(i) for i in range(len(documents))] == [b"a", b"b", b"c\n\nc"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2 is not JSON"),
    (b'{"text": "a"}\n\n{"body": "b"}\n', 'bad.jsonl:3 has no field "text" (fields body)'),
    (b"[1]\n", 'bad.jsonl:1 has no field "text" (a list)'),
    (b'{"text": 3}\n', '"text" of .*bad.jsonl:1 is a int'),
    (b'{"text": "\xff"}\n', "bad.jsonl:1 is not UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}\n', "bad.jsonl:1 is not valid Unicode"),
    (b"", "bad.jsonl holds no text"),
    (b" \n\n", "bad.jsonl holds no text"),
  ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, content, message):
  path = tmp_path / "bad.jsonl"
  path.write_bytes(content)
  with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
    read_documents(str(path))


def test_other_paths_that_hold_no_documents_are_errors(tmp_path):
  with pytest.raises(UserError, match="No such file"):
    read_documents(str(tmp_path / "missing.jsonl"))
  with pytest.raises(UserError, match="holds no .jsonl, .txt"):
    read_documents(str(tmp_path))
  (tmp_path / "a.csv").write_text("a")
  with pytest.raises(UserError, match="must end in .jsonl, .txt, .jsonl.gz, .jsonl.zst or .parquet"):
    read_documents(str(tmp_path / "a.csv"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_an_error(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("a")
  path.chmod(0)
  with pytest.raises(UserError, match="Permission denied"):
    read_documents(str(path))


def test_splits_are_disjoint_and_complete(jsonl):
  splits = held_out_splits(read_documents(jsonl))
  train, validation = set(splits["train"].offset), set(splits["validation"].offset)
  assert validation and not train & validation
  np.testing.assert_array_equal(sorted(train | validation), splits["all"].offset)


def test_a_rewritten_file_is_indexed_again(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one")
  read_documents(str(path))
  path.write_text("other")
  documents = read_documents(str(path))
  assert documents.read(0) == b"other"
