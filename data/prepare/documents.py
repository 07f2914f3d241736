"""Reads documents from files: text, Markdown and JSONL, plain or compressed; errors name the place.

A .txt or .md file is one document; a .jsonl file has one per line, in a field of its object. Each
may also end with .gz, .zst or .xz. Text is taken as it is, except for a byte order mark.
"""

import codecs
import glob
import json
import lzma
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

import zstandard

ErrorPolicy = Literal["strict", "replace"]
TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl",)
COMPRESSIONS = (".gz", ".zst", ".xz")
_SUFFIXES = TEXT_SUFFIXES + LINE_SUFFIXES + COMPRESSIONS

_CHUNK = 1 << 20
# Plain JSONL is cut at line ends into pieces of about this size, for many workers on one file.
PIECE_BYTES = 1 << 24
# Accepts windows of `zstd --long=31` too.
_MAX_WINDOW = 1 << 31


class Piece(NamedTuple):
  """Bytes start to stop of a file, whole documents: what one worker reads at a time."""

  path: str
  start: int
  stop: int


class Place:
  """str() is "path", or "path:line"; the line number is counted only when str() is called."""

  def __init__(self, piece: Piece, line: int | None):
    self._piece, self._line = piece, line

  def __str__(self) -> str:
    if self._line is None:
      return self._piece.path
    before = 0
    with open(self._piece.path, "rb") as file:
      for start in range(0, self._piece.start, _CHUNK):
        before += file.read(min(_CHUNK, self._piece.start - start)).count(b"\n")
    return f"{self._piece.path}:{before + self._line}"


class Document(NamedTuple):
  """is_replaced: bytes that were not UTF-8 became U+FFFD. A blank line is an empty document."""

  text: str
  where: Place | str
  is_replaced: bool


def find(patterns: Iterable[str], *, made: Iterable[str] = ()) -> list[str]:
  """The files that the globs match (** too), in the order of the patterns and names.

  Each is listed once, by its first name: `a.txt` and `./a.txt` are one file, and so are links to
  it. What a glob finds below the folders `made` and is not text belongs to a store, finished or
  not, and is ignored.
  """
  below_made = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in made)
  found: dict[str, str] = {}
  for pattern in patterns:
    # Brackets may be part of a file's own name.
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [match for match in matches if not os.path.isdir(match)]
    if not files:
      hint = f"a folder; give {pattern}/**/*.txt" if matches else "nothing matches"
      raise ValueError(f"--input {pattern!r}: {hint} (seen from {os.getcwd()})")
    for path in files:
      real = os.path.realpath(path)
      is_made = real.startswith(below_made) and not path.lower().endswith(_SUFFIXES)
      if real in found or (is_made and path != pattern):
        continue
      _kind(path)
      if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: a pipe or a device, not a file; it cannot be read twice")
      found[real] = path
  return list(found.values())


def pieces(path: str) -> list[Piece]:
  """The file as pieces of whole documents, in order; an empty file is one piece of no bytes."""
  size = os.path.getsize(path)
  cuts = [0]
  if _kind(path) == (".jsonl", ""):
    with open(path, "rb") as file:
      while cuts[-1] + PIECE_BYTES < size:
        file.seek(cuts[-1] + PIECE_BYTES)
        file.readline()
        cuts.append(file.tell())
  stops = [*cuts[1:], size]
  return [Piece(path, a, b) for a, b in zip(cuts, stops) if a < b or size == 0]


def read(
  piece: Piece,
  *,
  text_field: str,
  errors: ErrorPolicy,
  on_bytes: Callable[[bytes], None],
) -> Iterator[Document]:
  """The documents of a piece, empty ones included; `on_bytes` sees each chunk of the file itself.

  A file without a line is one empty document. ValueError, with file, line and byte, for text that
  is not UTF-8, not JSON, without the field, or cut off.
  """
  suffix, compression = _kind(piece.path)
  content = _decompressed(piece.path, compression, chunks(piece, on_bytes))
  if suffix in TEXT_SUFFIXES:
    yield _decode(b"".join(content), 0, Place(piece, None), errors)
    return
  offset, number = piece.start, 0
  for number, line in enumerate(_lines(content), start=1):
    document = _decode(line, offset, Place(piece, number), errors)
    offset += len(line) + 1
    if document.text.strip():
      document = _field(document, text_field, errors)
    yield document
  if not number:
    yield Document("", Place(piece, None), False)


class _Decompressor(Protocol):
  @property
  def eof(self) -> bool: ...
  @property
  def unused_data(self) -> bytes: ...
  def decompress(self, data: bytes, /) -> bytes: ...


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
  ".gz": lambda: zlib.decompressobj(wbits=31),
  ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj(),
  # Not the older .lzma format too: it would read zeros as an empty file.
  ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


def _kind(path: str) -> tuple[str, str]:
  """The suffix of the format and that of the compression, or "", in lower case."""
  suffixes = [suffix.lower() for suffix in pathlib.PurePath(path).suffixes]
  compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
  suffix = suffixes[-1] if suffixes else ""
  if suffix not in TEXT_SUFFIXES + LINE_SUFFIXES:
    raise ValueError(
      f"{path}: not one of {', '.join(TEXT_SUFFIXES + LINE_SUFFIXES)}, "
      f"each also with {', '.join(COMPRESSIONS)}"
    )
  return suffix, compression


def chunks(piece: Piece, on_bytes: Callable[[bytes], None]) -> Iterator[bytes]:
  with open(piece.path, "rb") as file:
    file.seek(piece.start)
    left = piece.stop - piece.start
    while left:
      chunk = file.read(min(_CHUNK, left))
      if not chunk:
        raise ValueError(f"{piece.path}: it became shorter while it was read")
      left -= len(chunk)
      on_bytes(chunk)
      yield chunk


def _decompressed(path: str, compression: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
  """All frames or members of the file, one after the other; a cut-off last one is an error."""
  if not compression:
    yield from chunks
    return
  stream, is_between = None, False
  try:
    for chunk in chunks:
      # Zeros between members are padding, in gzip and in xz.
      chunk = chunk.lstrip(b"\0") if is_between else chunk
      while chunk:
        stream = stream or _DECOMPRESSORS[compression]()
        yield stream.decompress(chunk)
        is_between = stream.eof
        if not is_between:
          break
        chunk, stream = stream.unused_data.lstrip(b"\0"), None
  except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
    raise ValueError(f"{path}: damaged, or not {compression} at all: {error}") from error
  if stream is not None:
    raise ValueError(f"{path}: truncated: the {compression} data does not end")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
  """Lines without their line feeds, including a last line that has none."""
  start_of_line: list[bytes] = []
  for chunk in chunks:
    first, *rest = chunk.split(b"\n")
    start_of_line.append(first)
    for line in rest:
      yield b"".join(start_of_line)
      start_of_line = [line]
  if last := b"".join(start_of_line):
    yield last


def _decode(content: bytes, offset: int, where: Place, errors: ErrorPolicy) -> Document:
  if not offset and content.startswith(codecs.BOM_UTF8):
    content, offset = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
  try:
    return Document(content.decode("utf-8"), where, False)
  except UnicodeDecodeError as error:
    if errors == "replace":
      return Document(content.decode("utf-8", errors="replace"), where, True)
    raise ValueError(
      f"{where}: not UTF-8: byte {offset + error.start} (after decompression, if compressed) is "
      f"0x{content[error.start]:02x}: {error.reason}; convert the file, or pass --errors=replace"
    ) from error


def _field(line: Document, text_field: str, errors: ErrorPolicy) -> Document:
  """The document in a line of JSON."""
  try:
    values = json.loads(line.text)
  # Not only JSONDecodeError: an integer of 5000 digits, or brackets within brackets without end.
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{line.where}: not JSON: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{line.where}: a {type(values).__name__}, not a JSON object")
  if text_field not in values:
    raise ValueError(
      f"{line.where}: no field {text_field!r}; it has {', '.join(values) or 'none'} "
      "(--text_field names it)"
    )
  text = values[text_field]
  if not isinstance(text, str):
    raise ValueError(f"{line.where}: field {text_field!r} is a {type(text).__name__}, not a string")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    # JSON can express half of a surrogate pair, which is not a character.
    if errors == "strict":
      raise ValueError(
        f"{line.where}: character {error.start} is half of a surrogate pair, not text; "
        "pass --errors=replace"
      ) from error
    return Document(
      text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), line.where, True
    )
  return line._replace(text=text)
