"""The formats documents come in: every document of a file with its place, or what is wrong with it.

  .jsonl      a JSON object on each line, the text in one of its fields         read where it lies
              (or in several: a conversation, see `chat`)
  .txt        the whole file is one document                                    read where it lies
  .jsonl.gz, .jsonl.zst, .parquet (the text in a column), any of these in a bucket, and splits of TensorFlow Datasets,
  tfds://NAME:VERSION/SPLIT (the text in a feature): unpacked once, see `sources`

A file that was cut off is an error and none of it is used, however many malformed lines are tolerated: a .gz or .zst
that ends inside a member or frame, a .parquet without its footer, lines of which the last has no newline and is no
JSON, a .txt that ends inside a character. What cannot be known: a .jsonl cut between two lines, and a .gz or .zst cut
between two members or frames that end with a line, are whole files with fewer documents.

pyarrow and zstandard are imported when the first such file is met.
"""

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from tsparse.data.chat import FIELDS, WANTED, Chat, hint
from tsparse.data.tensorflow import load_tensorflow
from tsparse.errors import UserError

IN_PLACE = (".jsonl", ".txt")
PACKED = (".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = IN_PLACE + PACKED
LISTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
TFDS = "tfds://"
ROWS = 256  # of a .parquet file that are decoded at once
COMPRESSED = 4096  # bytes of a .zst file that are unpacked at once; to 128 MB at most


class Item(NamedTuple):
  """A document of a file.

  Attributes:
    offset: where its bytes begin in the file (as unpacked, for .gz and .zst; 0 for .parquet).
    length: how many bytes it takes there.
    text: in UTF-8; empty for a blank line; a UserError for a malformed one.
  """

  offset: int
  length: int
  text: bytes | UserError


def is_remote(path: str) -> bool:
  """Whether `path` is in a bucket (gs://, s3://, ...), which `etils.epath` reads through TensorFlow or fsspec."""
  return "://" in path


def path_of(path: str) -> epath.Path:
  """A path here or in a bucket."""
  if path.startswith("gs://"):
    load_tensorflow()  # through which etils reads them, and which must be silenced first
  return epath.Path(path).expanduser()


def open_bytes(path: str):
  """A file object of the bytes of a file, here or in a bucket."""
  return path_of(path).open("rb") if is_remote(path) else open(path, "rb")


def tfds_folder(path: str) -> Path:
  """Where TFDS keeps, or would keep, the dataset of tfds://NAME:VERSION/SPLIT; TFDS is not imported."""
  root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
  return root.joinpath(*path.removeprefix(TFDS).split("/")[0].split(":"))


def read_items(path: str, field: str | Chat) -> Iterator[Item]:
  """Every document of a file, one after the other, in memory that only the largest decides.

  Args:
    path: ends in one of SUFFIXES, or begins with TFDS.
    field: of each line or row that holds the text; or how its conversation is read.

  Raises:
    OSError: the file cannot be read.
    UserError: it is damaged, or of another kind than its name says.
  """
  if path.startswith(TFDS):
    yield from _tfds(path, field)
    return
  with open_bytes(path) as f:
    if path.endswith(".txt") and isinstance(field, Chat):
      raise UserError(f"{path} is plain text and conversations are asked for: name files of another format.")
    elif path.endswith(".txt"):
      data = f.read()
      yield Item(0, len(data), _whole_text(data, path))
    elif path.endswith(".jsonl"):
      yield from _lines(f, path, field)
    elif path.endswith(".jsonl.gz"):
      with _damage(path, zlib.error, EOFError, gzip.BadGzipFile), gzip.open(f) as lines:
        yield from _lines(lines, path, field)
    elif path.endswith(".jsonl.zst"):
      yield from _zstandard(f, path, field)
    elif path.endswith(".parquet") and isinstance(field, Chat):
      yield from _conversations(f, path, field)
    elif path.endswith(".parquet"):
      yield from _parquet(f, path, field)
    else:
      raise UserError(f"Cannot read documents from {path}: it must end in {LISTED} (or be a folder of such files).")


@contextlib.contextmanager
def _damage(path: str, *kinds: type[Exception]):
  try:
    yield
  except kinds as e:
    raise UserError(f"{path} is damaged ({e}); fetch or make it again.") from e


def _lines(f, path: str, field: str | Chat) -> Iterator[Item]:
  offset = 0
  for number, line in enumerate(f, start=1):
    text = _text_of_line(line, f"{path}:{number}", field) if line.strip() else b""
    if isinstance(text, UserError) and not line.endswith(b"\n") and not _is_json(line):
      raise UserError(
        f"{path} is cut off: line {number}, its last, has no newline and is not JSON; fetch or make the file again, or "
        "remove that line."
      )
    yield Item(offset, len(line), text)
    offset += len(line)


def _is_json(line: bytes) -> bool:
  try:
    json.loads(line)
  except (ValueError, RecursionError):
    return False
  return True


def _whole_text(data: bytes, path: str) -> bytes | UserError:
  try:
    data.decode()
  except UnicodeDecodeError as e:
    if e.reason == "unexpected end of data":
      raise UserError(f"{path} is cut off: it ends inside a character of UTF-8; fetch or make it again.") from e
  return _checked(data, path)


def _zstandard(f, path: str, field: str | Chat) -> Iterator[Item]:
  import zstandard  # here: few need it

  with _damage(path, zstandard.ZstdError, EOFError):
    yield from _lines(io.BufferedReader(_Frames(f, zstandard.ZstdDecompressor())), path, field)


class _Frames(io.RawIOBase):
  """The frames of a .zst file, unpacked; zstandard's own reader takes a frame that is cut off for the end of it."""

  def __init__(self, f, decompressor):
    self._f, self._decompressor = f, decompressor
    self._frame, self._packed, self._unpacked = None, b"", memoryview(b"")

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    """Reads some bytes; EOFError where the file ends inside a frame, ZstdError where it is damaged."""
    while not self._unpacked:
      self._packed = self._packed or self._f.read(COMPRESSED)
      if not self._packed and self._frame is not None:
        raise EOFError("it ends inside a frame")
      if not self._packed:
        return 0
      self._frame = self._frame or self._decompressor.decompressobj()
      self._unpacked = memoryview(self._frame.decompress(self._packed))
      self._packed = self._frame.unused_data
      self._frame = None if self._frame.eof else self._frame
    size = min(len(buffer), len(self._unpacked))
    buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
    return size


def _conversations(f, path: str, chat: Chat) -> Iterator[Item]:
  import pyarrow as pa  # here: few need it
  import pyarrow.parquet as pq

  with _damage(path, pa.ArrowException, UnicodeDecodeError):
    table = pq.ParquetFile(f)
    columns = [name for name in table.schema_arrow.names if name in FIELDS]
    if not columns:
      raise UserError(f"{path} has only the columns {', '.join(table.schema_arrow.names)}; {WANTED}.")
    row = 0
    for batch in table.iter_batches(batch_size=ROWS, columns=columns):
      for record in batch.to_pylist():
        row += 1
        yield Item(0, 0, chat.text_of(record, f"Row {row} of {path}"))


def _parquet(f, path: str, field: str) -> Iterator[Item]:
  import pyarrow as pa  # here: few need it
  import pyarrow.parquet as pq

  with _damage(path, pa.ArrowException):
    table = pq.ParquetFile(f)
    names = table.schema_arrow.names
    if field not in names:
      raise UserError(
        f"{path} has no column {field!r}, only {', '.join(names)}; name the column of the text in "
        "--config.data.text_field."
      )
    kind = table.schema_arrow.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
      raise UserError(
        f"The column {field!r} of {path} holds {kind}, not text; name another in --config.data.text_field."
      )
    row = 0
    for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
      for value in batch.column(0):
        row += 1
        text = value.as_buffer()
        if text is None:
          yield Item(0, 0, UserError(f"Row {row} of {path} has no {field!r} (null); leave out or mend such rows."))
        else:
          data = text.to_pybytes()
          yield Item(0, len(data), _checked(data, f"Row {row} of {path}"))


def _tfds(path: str, field: str) -> Iterator[Item]:
  _, tf = load_tensorflow()
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(tfds_folder(path))  # reads what was built; nothing is downloaded
  config = tfds.ReadConfig(try_autocache=False)
  with _damage(path, tf.errors.OpError):  # also where there are fewer documents than its dataset_info.json counts
    for number, row in enumerate(tfds.as_numpy(builder.as_dataset(split=path.split("/")[-1], read_config=config))):
      yield Item(0, len(row[field]), _checked(row[field], f"Document {number} of {path}"))


def _checked(data: bytes, place: str) -> bytes | UserError:
  try:
    data.decode()
  except UnicodeDecodeError as e:
    return UserError(f"{place} is not UTF-8 at byte {e.start}; convert it to UTF-8.")
  return data


def _text_of_line(line: bytes, place: str, field: str | Chat) -> bytes | UserError:
  chat = isinstance(field, Chat)
  wanted = WANTED if chat else f'each line must be a JSON object with a string field "{field}"'
  try:
    record = json.loads(line.decode())
  except UnicodeDecodeError as e:
    return UserError(f"{place} is not UTF-8 at byte {e.start}; convert it to UTF-8.")
  except (ValueError, RecursionError) as e:  # also a number too long, or brackets too deep, to be read
    return UserError(f"{place} is not JSON ({e}); {wanted}.")
  if chat:
    return field.text_of(record, place)
  if not isinstance(record, dict) or field not in record:
    found = f"fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
    return UserError(
      f'{place} has no field "{field}" ({found}); {wanted}, or name its field in --config.data.text_field.'
      + hint(record)
    )
  if not isinstance(record[field], str):
    return UserError(f'The field "{field}" of {place} is a {type(record[field]).__name__}; {wanted}.')
  try:
    return record[field].encode()
  except UnicodeEncodeError:
    return UserError(f'The field "{field}" of {place} is not valid Unicode (a lone surrogate); {wanted}.')


def document_of(data: bytes, field: str | Chat) -> bytes:
  """What an Item's text was, of the same line read again."""
  record = json.loads(data)
  return field.text_of(record, "") if isinstance(field, Chat) else record[field].encode()
