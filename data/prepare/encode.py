"""Pieces of text files to parts, by one or many worker processes."""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data import vocabulary
from data.prepare import documents
from data.prepare.documents import Document, ErrorPolicy, Piece
from data.prepare.parts import Part, PartWriter
from data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How text becomes tokens; the three tokens as in vocabulary.load."""

  vocabulary: str
  bos_token: str = "auto"
  eos_token: str = "auto"
  pad_token: str = "auto"
  text_field: str = "text"
  errors: ErrorPolicy = "strict"

  def load(self) -> Vocabulary:
    return vocabulary.load(
      self.vocabulary,
      bos_token=self.bos_token,
      eos_token=self.eos_token,
      pad_token=self.pad_token,
    )


def encode(
  piece: Piece,
  name: str,
  *,
  folder: pathlib.Path,
  settings: Settings,
  words: Vocabulary,
  on_bytes: Callable[[int], object],
) -> Part:
  """Makes the part of a piece; `on_bytes` is called with the number of bytes that were read."""
  digest = hashlib.sha256()

  def seen(chunk: bytes) -> None:
    digest.update(chunk)
    on_bytes(len(chunk))

  with PartWriter(folder, name, words.record.dtype) as writer:
    for document in documents.read(
      piece, text_field=settings.text_field, errors=settings.errors, on_bytes=seen
    ):
      writer.note(document)
      if document.text.strip():
        tokens = _tokens(document, words)
        writer.append(
          tokens,
          text_bytes=len(document.text.encode("utf-8")),
          num_unknown=0 if words.unknown is None else int((tokens == words.unknown).sum()),
        )
    return writer.close(digest=digest.hexdigest())


def _tokens(document: Document, words: Vocabulary) -> np.ndarray:
  try:
    return words.encode(document.text)
  except ValueError as error:
    raise ValueError(f"{document.where}: {error}") from error


def encode_all(
  named: Sequence[tuple[Piece, str]],
  *,
  folder: pathlib.Path,
  settings: Settings,
  num_workers: int,
  on_bytes: Callable[[int], object],
) -> None:
  """Makes the parts of these pieces in any order. The first error ends it; finished parts stay."""
  if num_workers == 1:
    words = settings.load()
    for piece, name in named:
      encode(piece, name, folder=folder, settings=settings, words=words, on_bytes=on_bytes)
    return
  context = multiprocessing.get_context("spawn")
  counter, stop = context.Value("q", 0), context.Event()
  seen = 0
  with concurrent.futures.ProcessPoolExecutor(
    num_workers,
    mp_context=context,
    initializer=_start_worker,
    initargs=(settings, folder, counter, stop),
  ) as pool:
    waiting = {pool.submit(_encode_in_worker, piece, name) for piece, name in named}
    try:
      while waiting:
        done, waiting = concurrent.futures.wait(waiting, timeout=0.2)
        total = counter.value
        on_bytes(total - seen)
        seen = total
        for future in done:
          future.result()
    finally:
      stop.set()
      pool.shutdown(wait=False, cancel_futures=True)


class _StoppedError(Exception):
  """Another worker, or the user, ended the run."""


# In a worker process: what its tasks share.
_worker: dict[str, Any] = {}


def _start_worker(settings: Settings, folder: pathlib.Path, counter: Any, stop: Any) -> None:
  # Ctrl-C goes to the whole group; the parent alone decides what to do.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_leave_with_parent, daemon=True).start()
  words = settings.load()
  _worker.update(settings=settings, folder=folder, counter=counter, stop=stop, words=words)


def _leave_with_parent() -> None:
  """Ends this process when its parent was killed, because nothing else would."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


def _encode_in_worker(piece: Piece, name: str) -> None:
  counter, stop = _worker["counter"], _worker["stop"]

  def on_bytes(count: int) -> None:
    if stop.is_set():
      raise _StoppedError
    with counter.get_lock():
      counter.value += count

  encode(
    piece,
    name,
    folder=_worker["folder"],
    settings=_worker["settings"],
    words=_worker["words"],
    on_bytes=on_bytes,
  )
