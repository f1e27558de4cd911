import ast
import json
from pathlib import Path

import pytest

from tsparse.data import sources, stdlib


@pytest.fixture
def library(tmp_path) -> Path:
  root = tmp_path / "lib"
  (root / "test").mkdir(parents=True)
  (root / "test/left_out.py").write_text('"""A test that nobody should ever read."""\n')
  (root / "bad.py").write_text("def :\n")
  (root / "m.py").write_text(
    '"""What the module is for, in words."""\n'
    'x = """\n# not a comment but a string\n"""\n'
    "# a comment in\n# two whole lines\n"
  )
  return root


def texts(folder, task):
  files = [folder / f"{task}.{split}.jsonl" for split in ("train", "validation")]
  return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def test_docstrings_and_comments_are_extracted(library, tmp_path):
  stdlib.extract(library, tmp_path / "out")
  assert texts(tmp_path / "out", "stdlib_docs") == [
    "What the module is for, in words.",
    "a comment in\ntwo whole lines",
  ]
  assert texts(tmp_path / "out", "stdlib_code") == [(library / "m.py").read_text()]
  assert json.loads((tmp_path / "out/summary.json").read_text())["files that do not parse"] == 1


def test_long_source_is_cut_without_loss():
  source = "".join(Path(m.__file__).read_text() for m in (ast, json, sources)).rstrip("\n")
  pieces = stdlib._pieces(source, ast.parse(source))
  assert "".join(pieces) == source
  assert len(pieces) > 10 and max(map(len, pieces)) <= stdlib.PIECE_BYTES


def test_the_cache_is_published_whole_and_once(library, tmp_path, monkeypatch):
  monkeypatch.setenv("TSPARSE_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(stdlib, "library", lambda: library)
  extract = stdlib.extract

  def overtaken(source, out):
    assert not list((tmp_path / "cache").glob("stdlib-*"))  # nothing to see before it is complete
    extract(source, out)
    monkeypatch.setattr(stdlib, "extract", extract)
    stdlib.extracted()  # another process finishes first

  monkeypatch.setattr(stdlib, "extract", overtaken)
  folder = stdlib.extracted()
  assert len(texts(folder, "stdlib_docs")) == 2
  assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
  monkeypatch.setattr(stdlib, "extract", None)
  assert stdlib.extracted() == folder
