"""Parts: encoded pieces of the input, kept in a working folder until all are there to make a store.

A part's name follows from everything that its tokens depend on. So a killed run leaves its finished
parts to the next one, and after a change of a file or a setting the old ones are simply not found.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from data.file_lock import open_locked
from data.prepare.documents import Document
from data.token_store import Writer

# How many empty or replaced documents a report names.
_NUM_NAMED = 3
# Suffixes of a part's files. The description is written last: if it exists, the part is whole.
_SUFFIXES = (".tokens", ".sizes", ".json")
_PART_FILE = re.compile(r"[0-9a-f]{32}\.(tokens|sizes|json)(\.\d+)?")
# Tokens of a part that are in memory at a time.
_BLOCK_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One finished part. empty and replaced: the places of the first such documents.

  digest: sha256 of the bytes it was made from.
  """

  name: str
  digest: str
  num_tokens: int
  num_documents: int
  num_empty: int
  empty: tuple[str, ...]
  num_replaced: int
  replaced: tuple[str, ...]


def part_name(identity: Any) -> str:
  """The name of the part that depends on these values, which JSON can hold."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def working_folder(folder: pathlib.Path) -> Iterator[None]:
  """Locks the folder for this process; without an error, removes our files in it at the end."""
  with held(folder / "prepare.lock"):
    yield
    for file in folder.iterdir():
      if _PART_FILE.fullmatch(file.name):
        file.unlink()
  if not any(folder.iterdir()):
    folder.rmdir()


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[None]:
  """Holds the lock file `path` for this process alone; without an error, removes it at the end.

  ValueError if another process holds it. On a file system without locks it warns.
  """
  with _locked(path):
    yield
    path.unlink()


def _locked(path: pathlib.Path) -> TextIO:
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The holder before may remove the folder too, after it was made here.
    with contextlib.suppress(FileNotFoundError):
      file = open_locked(path)
      if file is None:
        raise ValueError(f"{path.parent}: another prepare is at work here; wait for it")
      return file


class PartWriter:
  """Writes one part, document by document, in a `with`; it exists only after close()."""

  def __init__(self, folder: pathlib.Path, name: str, dtype: np.dtype):
    self._folder, self._name, self._dtype = folder, name, dtype
    self._file = self._unfinished(".tokens").open("wb")
    self._sizes: list[tuple[int, int, int]] = []
    self._empty: list[str] = []
    self._replaced: list[str] = []
    self._num_empty = self._num_replaced = 0

  def __enter__(self) -> "PartWriter":
    return self

  def __exit__(self, *exception: object) -> None:
    # On a full disk closing fails again, which must not keep the file there.
    with contextlib.suppress(OSError):
      self._file.close()
    for suffix in _SUFFIXES:
      self._unfinished(suffix).unlink(missing_ok=True)

  def append(self, tokens: np.ndarray, *, text_bytes: int, num_unknown: int) -> None:
    """Adds a document; the ids must fit the part's dtype."""
    with self._writing():
      self._file.write(np.ascontiguousarray(tokens, self._dtype).data)
    self._sizes.append((len(tokens), text_bytes, num_unknown))

  def note(self, document: Document) -> None:
    """Counts a document that is empty or had bytes replaced."""
    if document.is_replaced:
      self._num_replaced += 1
      self._replaced += [str(document.where)] if self._num_replaced <= _NUM_NAMED else []
    if not document.text.strip():
      self._num_empty += 1
      self._empty += [str(document.where)] if self._num_empty <= _NUM_NAMED else []

  def close(self, *, digest: str) -> Part:
    with self._writing():
      self._file.close()
    sizes = np.array(self._sizes, np.int64).reshape(-1, 3)
    part = Part(
      name=self._name,
      digest=digest,
      num_tokens=int(sizes[:, 0].sum()),
      num_documents=len(sizes),
      num_empty=self._num_empty,
      empty=tuple(self._empty),
      num_replaced=self._num_replaced,
      replaced=tuple(self._replaced),
    )
    with self._writing():
      self._unfinished(".sizes").write_bytes(sizes.tobytes())
      self._unfinished(".json").write_text(json.dumps(dataclasses.asdict(part)))
    for suffix in _SUFFIXES:
      os.replace(self._unfinished(suffix), self._folder / f"{self._name}{suffix}")
    return part

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Adds the path to an error of the disk: errors of open files do not name it."""
    try:
      yield
    except OSError as error:
      error.filename = error.filename or str(self._folder)
      raise

  def _unfinished(self, suffix: str) -> pathlib.Path:
    # The process id is in the name: a worker of a killed run may still be writing the same part.
    return self._folder / f"{self._name}{suffix}.{os.getpid()}"


def load(folder: pathlib.Path, name: str, dtype: np.dtype) -> Part | None:
  """The finished part of this name, or None; a part with incomplete files is not finished."""
  try:
    values = json.loads((folder / f"{name}.json").read_text())
    values["empty"], values["replaced"] = tuple(values["empty"]), tuple(values["replaced"])
    part = Part(**values)
    num_bytes = (folder / f"{name}.tokens").stat().st_size
    num_sizes = (folder / f"{name}.sizes").stat().st_size
  except (OSError, ValueError, TypeError, KeyError):
    return None
  is_whole = num_bytes == part.num_tokens * dtype.itemsize and num_sizes == part.num_documents * 24
  return part if is_whole else None


def assemble(
  parts: Iterable[Part],
  *,
  folder: pathlib.Path,
  dtype: np.dtype,
  train: Writer,
  holdout: Writer | None,
  holdout_every: int,
  on_tokens: Callable[[int], object],
) -> None:
  """Appends all parts in order to `train`, and every holdout_every-th document to `holdout`
  instead.

  Documents count from 1, over all parts.
  """
  number = 0
  for part in parts:
    for tokens, sizes in _blocks(part, folder, dtype):
      numbers = number + 1 + np.arange(len(sizes))
      number += len(sizes)
      if holdout is None:
        _append(train, tokens, sizes)
      else:
        is_held_out = numbers % holdout_every == 0
        is_held_out_token = np.repeat(is_held_out, sizes[:, 0])
        _append(train, tokens[~is_held_out_token], sizes[~is_held_out])
        _append(holdout, tokens[is_held_out_token], sizes[is_held_out])
      on_tokens(len(tokens))


def _append(writer: Writer, tokens: np.ndarray, sizes: np.ndarray) -> None:
  lengths, text_bytes, num_unknown = sizes.T
  writer.append(
    tokens, lengths, text_bytes=int(text_bytes.sum()), num_unknown=int(num_unknown.sum())
  )


def _blocks(
  part: Part, folder: pathlib.Path, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Tokens and lengths of groups of whole documents, about _BLOCK_TOKENS tokens each."""
  if not part.num_documents:
    return
  sizes = np.fromfile(folder / f"{part.name}.sizes", np.int64).reshape(-1, 3)
  tokens = np.memmap(folder / f"{part.name}.tokens", dtype, mode="r")
  stops = np.cumsum(sizes[:, 0])
  low, start = 0, 0
  while low < part.num_documents:
    high = max(low + 1, int(np.searchsorted(stops, start + _BLOCK_TOKENS, side="right")))
    stop = int(stops[high - 1])
    yield np.asarray(tokens[start:stop]), sizes[low:high]
    low, start = high, stop
