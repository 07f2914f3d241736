"""Token stores: documents as one flat array of tokens, the document starts, and a manifest.

  STORE/tokens/         zarr 3, the smallest unsigned type that holds the vocabulary; shards of 2^22
                        tokens in blocks of 2^13, each with a CRC: a row is read alone, a damaged
                        one is refused
  STORE/starts/         zarr 3, int64: where each document starts in `tokens`
  STORE/vocabulary_file the vocabulary's file as it was given: a tokenizer.json or SentencePiece
                        model; not there for bytes, nor in older stores
  STORE/manifest.json   vocabulary, counts, sizes, digests; written last: without it, no store

A path is local, or a URL that TensorStore reads (gs://bucket/folder/store). The tokens of all
documents are stored one after the other; data/rows.py defines rows.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from data.bucket import checked_codecs, is_url
from data.vocabulary import VocabularyRecord

_FORMAT = "token_store 1"
_SHARD = 1 << 22
_BLOCK = 1 << 13
_CACHE_BYTES = 1 << 26
# A store up to this size is read into memory when it is opened, and thereby checked.
IN_MEMORY_BYTES = 1 << 30
_ARRAYS = ("starts", "tokens")
_VOCABULARY = "vocabulary_file"
_ARRAY_FILE = re.compile(r"zarr\.json|c/\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What is in a store. Digests are of the values (little-endian bytes), not of the files.

  text_bytes: UTF-8 bytes of all documents. num_unknown: tokens for text that the vocabulary cannot
  express. files: name and size of each file under the store. origin: what the store was made from,
  according to the program that made it; not in the fingerprint.
  """

  vocabulary: VocabularyRecord
  num_tokens: int
  num_documents: int
  text_bytes: int
  num_unknown: int
  token_digests: tuple[str, ...]  # sha256 of each shard
  starts_digest: str
  files: dict[str, int]
  origin: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def fingerprint(self) -> str:
    """Equal for equal tokens, documents and vocabulary, whichever program wrote them, anywhere."""
    content = [dataclasses.asdict(self.vocabulary), self.token_digests, self.starts_digest]
    content += [self.num_tokens, self.num_documents, self.text_bytes]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def to_json(self) -> str:
    values = {"format": _FORMAT, "fingerprint": self.fingerprint, **dataclasses.asdict(self)}
    return json.dumps(values, indent=1) + "\n"


def read_manifest(path: str) -> Manifest:
  """The manifest of the store at `path`, after the cheap checks: finished, not edited, not cut off.

  Sizes of files are compared for local stores; a remote one is checked when its blocks are read.
  """
  folder = _kvstore(path)
  found = folder.read("manifest.json").result()
  if found.state != "value":
    raise ValueError(
      f"token store {path}: no manifest.json: no store is there, or one that was not finished; "
      f"`python -m launch.prepare --input ... --output {path}` makes it, or goes on"
    )
  manifest = _parse(path, bytes(found.value))
  if not is_url(path):
    for name, size in manifest.files.items():
      file = pathlib.Path(path) / name
      if not file.is_file():
        raise ValueError(f"token store {path}: {name} is missing; prepare the store again")
      if file.stat().st_size != size:
        raise ValueError(
          f"token store {path}: {name} has {file.stat().st_size} bytes, the manifest says {size}: "
          "truncated or edited; prepare the store again"
        )
  return manifest


def vocabulary_file(path: str) -> bytes:
  """The file of the vocabulary that the store at `path` was made with; empty if it keeps none."""
  content = _kvstore(path).read(_VOCABULARY).result()
  if content.state != "value":
    return b""
  digest = hashlib.sha256(content.value).hexdigest()
  if digest != read_manifest(path).vocabulary.fingerprint:
    raise ValueError(
      f"token store {path}: {_VOCABULARY} is not the vocabulary of the tokens: it was edited; copy "
      "the original file there, or delete it"
    )
  return bytes(content.value)


class TokenStore:
  """A complete store, open for reading; thread-safe, any slice at any time.

  ValueError as from read_manifest, and if the content is not what the manifest says. Stores up to
  `in_memory_bytes` are checked when they are opened; of larger ones a damaged block is found when
  it is read (CRC) or by verify() (sha256). Document starts are always in memory: 8 bytes each.
  """

  def __init__(self, path: str, *, in_memory_bytes: int = IN_MEMORY_BYTES):
    self.path = path
    self.manifest = read_manifest(path)
    self.starts = self._read(self._open("starts", np.dtype(np.int64), self.manifest.num_documents))
    self._check("starts", self.starts, self.manifest.starts_digest)
    dtype = self.manifest.vocabulary.dtype
    self._array = self._open("tokens", dtype, self.manifest.num_tokens)
    self._tokens: np.ndarray | None = None
    if self.manifest.num_tokens * dtype.itemsize <= in_memory_bytes:
      self._tokens = np.empty(self.manifest.num_tokens, dtype)
      for start, shard in self._verified_shards():
        self._tokens[start : start + len(shard)] = shard

  def read(self, starts: np.ndarray, length: int) -> np.ndarray:
    """[len(starts), length] tokens, int32; positions past the end of the store are padding."""
    tokens = np.full((len(starts), length), self.manifest.vocabulary.pad, np.int32)
    stops = np.minimum(starts + length, self.manifest.num_tokens)
    if self._tokens is not None:
      for row, start, stop in zip(tokens, starts, stops):
        row[: stop - start] = self._tokens[start:stop]
      return tokens
    waiting = [self._array[start:stop].read() for start, stop in zip(starts, stops)]
    for row, start, stop, future in zip(tokens, starts, stops, waiting):
      row[: stop - start] = self._result(future)
    return tokens

  def verify(self) -> None:
    """Reads everything and compares it with the manifest's digests; raises ValueError."""
    for _ in self._verified_shards():
      pass

  def _verified_shards(self) -> Iterator[tuple[int, np.ndarray]]:
    for index, digest in enumerate(self.manifest.token_digests):
      start = index * _SHARD
      stop = min(start + _SHARD, self.manifest.num_tokens)
      shard = self._read(self._array[start:stop])
      self._check(f"tokens {start} to {stop}", shard, digest)
      yield start, shard

  def _open(self, name: str, dtype: np.dtype, length: int) -> Any:
    spec = {
      "driver": "zarr3",
      "kvstore": _url(self.path, name),
      "fill_missing_data_reads": False,
      # A finished store does not change, so the indices of its shards are fetched once.
      "context": {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}},
      "recheck_cached_data": False,
    }
    array = self._result(ts.open(spec, open=True, read=True))
    if array.shape != (length,) or array.dtype.numpy_dtype != dtype:
      raise ValueError(
        f"token store {self.path}: {name} is {array.dtype.name}{array.shape}, the manifest says "
        f"{dtype.name}({length},): edited; prepare the store again"
      )
    return array

  def _read(self, array: Any) -> np.ndarray:
    return self._result(array.read())

  def _result(self, future: Any) -> Any:
    try:
      return future.result()
    except ValueError as error:
      raise ValueError(
        f"token store {self.path}: truncated or edited; prepare the store again ({error})"
      ) from error

  def _check(self, what: str, values: np.ndarray, digest: str) -> None:
    if _digest(values) != digest:
      raise ValueError(
        f"token store {self.path}: {what}: the content is not what the manifest's fingerprint "
        "stands for: edited; prepare the store again"
      )


class Writer:
  """Writes a store document by document; it is complete after close() and not before."""

  def __init__(
    self,
    path: str,
    vocabulary: VocabularyRecord,
    *,
    vocabulary_file: bytes = b"",
    origin: dict[str, Any] | None = None,
  ):
    self._path = path
    self._vocabulary = vocabulary
    self._vocabulary_file = vocabulary_file
    self._origin = origin or {}
    self._num_tokens = self._text_bytes = self._num_unknown = 0
    self._starts: list[np.ndarray] = []
    self._waiting: list[np.ndarray] = []
    self._num_waiting = 0
    self._digests: list[str] = []
    _clear(path)
    self._array = _create(path, "tokens", vocabulary.dtype)

  def append(
    self,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    text_bytes: int,
    num_unknown: int = 0,
  ) -> None:
    """Adds len(lengths) documents, whose tokens (with bos and eos) follow one another."""
    if int(lengths.sum()) != len(tokens) or (lengths < 1).any():
      raise ValueError(
        f"token store {self._path}: {len(tokens)} tokens cannot be documents of lengths that sum "
        f"to {int(lengths.sum())}, each at least 1"
      )
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= self._vocabulary.size:
      raise ValueError(
        f"token store {self._path}: token id {low if low < 0 else high} is negative or not "
        f"below the vocabulary size {self._vocabulary.size}"
      )
    self._starts.append(self._num_tokens + np.cumsum(lengths, dtype=np.int64) - lengths)
    self._num_tokens += len(tokens)
    self._text_bytes += text_bytes
    self._num_unknown += num_unknown
    self._waiting.append(tokens.astype(self._vocabulary.dtype))
    self._num_waiting += len(tokens)
    if self._num_waiting >= _SHARD:
      self._write_shards(np.concatenate(self._waiting))

  def close(self) -> Manifest:
    """Writes what is left, then the manifest; from now on the store is complete."""
    if not self._num_tokens:
      raise ValueError(f"token store {self._path}: no document was written")
    if self._num_waiting:
      self._write_shards(np.concatenate(self._waiting), is_last=True)
    self._array.resize(exclusive_max=[self._num_tokens], resize_metadata_only=True).result()
    starts = np.concatenate(self._starts)
    array = _create(self._path, "starts", starts.dtype)
    array.resize(exclusive_max=[len(starts)], resize_metadata_only=True).result()[...] = starts
    manifest = Manifest(
      vocabulary=self._vocabulary,
      num_tokens=self._num_tokens,
      num_documents=len(starts),
      text_bytes=self._text_bytes,
      num_unknown=self._num_unknown,
      token_digests=tuple(self._digests),
      starts_digest=_digest(starts),
      files=_sizes(self._path),
      origin=self._origin,
    )
    if self._vocabulary_file:
      _kvstore(self._path).write(_VOCABULARY, self._vocabulary_file).result()
    _kvstore(self._path).write("manifest.json", manifest.to_json().encode()).result()
    return manifest

  def _write_shards(self, tokens: np.ndarray, *, is_last: bool = False) -> None:
    while len(tokens) >= _SHARD or (is_last and len(tokens)):
      shard, tokens = tokens[:_SHARD], tokens[_SHARD:]
      start = len(self._digests) * _SHARD
      self._array[start : start + len(shard)].write(shard).result()
      self._digests.append(_digest(shard))
    self._waiting, self._num_waiting = [tokens], len(tokens)


def write(
  path: str, documents: Iterable[np.ndarray], vocabulary: VocabularyRecord, *, text_bytes: int
) -> Manifest:
  """Makes a store from documents given as token ids, with bos and eos."""
  writer = Writer(path, vocabulary)
  for document in documents:
    writer.append(np.asarray(document), np.array([len(document)]), text_bytes=0)
  writer.append(np.empty(0, np.int64), np.empty(0, np.int64), text_bytes=text_bytes)
  return writer.close()


def remove(path: str) -> None:
  """Removes a finished store's manifest: it is no store any more, and Writer may replace it."""
  _kvstore(path).write("manifest.json", None).result()


def is_complete(path: str) -> bool:
  """Whether a finished store lies at `path`, sound or not."""
  return _kvstore(path).read("manifest.json").result().state == "value"


def check_place(path: str) -> None:
  """ValueError if other files are where a new store's arrays go: writing would delete them."""
  if is_complete(path):
    return
  for name in _ARRAYS:
    for key in _kvstore(f"{path.rstrip('/')}/{name}").list().result():
      if not _ARRAY_FILE.fullmatch(os.fsdecode(key)):
        raise ValueError(
          f"{path}: {name}/{os.fsdecode(key)} lies where a token store would go and is no part of "
          "one; move it, or choose another place"
        )


def _parse(path: str, content: bytes) -> Manifest:
  try:
    values = json.loads(content)
    form, fingerprint = values.pop("format"), values.pop("fingerprint")
    manifest = _manifest(values) if form == _FORMAT else None
  # ValueError: not JSON, not UTF-8, or special tokens beyond the vocabulary.
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"token store {path}: manifest.json is truncated or edited ({error!r}); prepare it again"
    ) from error
  if manifest is None:
    raise ValueError(
      f"token store {path}: format {form!r}, this program reads {_FORMAT!r}; prepare it again"
    )
  if manifest.fingerprint != fingerprint:
    raise ValueError(
      f"token store {path}: manifest.json was edited: its content has fingerprint "
      f"{manifest.fingerprint[:16]}, it says {fingerprint[:16]}; prepare the store again"
    )
  return manifest


def _manifest(values: dict[str, Any]) -> Manifest:
  values["vocabulary"] = VocabularyRecord(**values["vocabulary"])
  values["token_digests"] = tuple(values["token_digests"])
  values["files"], values["origin"] = dict(values["files"]), dict(values["origin"])
  return Manifest(**values)


def _create(path: str, name: str, dtype: np.dtype) -> Any:
  """An array that grows: its length is set when it is known."""
  blocks = {
    "chunk_shape": [_BLOCK],
    "codecs": checked_codecs(dtype),
    "index_codecs": checked_codecs(np.dtype(np.uint64)),
  }
  metadata = {
    "shape": [1 << 60],
    "data_type": dtype.name,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_SHARD]}},
    "codecs": [{"name": "sharding_indexed", "configuration": blocks}],
    "fill_value": 0,
  }
  spec = {
    "driver": "zarr3",
    "kvstore": _url(path, name),
    "metadata": metadata,
    # Otherwise a block of zeros would not be stored, and would look like a lost one.
    "store_data_equal_to_fill_value": True,
  }
  return ts.open(spec, create=True, delete_existing=True).result()


def _clear(path: str) -> None:
  """Removes an unfinished store; a finished one is never removed."""
  if is_complete(path):
    raise ValueError(f"token store {path}: it exists; remove it first, or choose another path")
  check_place(path)
  if not is_url(path):
    for name in _ARRAYS:
      shutil.rmtree(pathlib.Path(path) / name, ignore_errors=True)


def _sizes(path: str) -> dict[str, int]:
  if is_url(path):
    return {}
  root = pathlib.Path(path)
  files = sorted(file for name in _ARRAYS for file in (root / name).rglob("*"))
  return {
    file.relative_to(root).as_posix(): file.stat().st_size for file in files if file.is_file()
  }


def _digest(values: np.ndarray) -> str:
  little = values.astype(values.dtype.newbyteorder("<"), copy=False)
  return hashlib.sha256(np.ascontiguousarray(little).data).hexdigest()


def _url(path: str, name: str) -> str:
  root = path if is_url(path) else pathlib.Path(path).absolute().as_uri()
  return f"{root.rstrip('/')}/{name}/"


def _kvstore(path: str) -> Any:
  return ts.KvStore.open(_url(path, "").rstrip("/") + "/").result()
