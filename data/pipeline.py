"""Batches for training and evaluation: mixture, shuffle, per-process shard, read-ahead (Grain).

The global batch of a step is a pure function of (config, step, the batches passed over). Any number
of processes reads the same one, each its own slice, and the step is the only position to restore.
The end of the data is computed from the config too, so every host stops at the same step.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import grain
import numpy as np

from data import token_store
from data.mixture import Mixture, RowAddress, integer_shares
from data.rows import Batch, Rows, num_rows
from data.token_store import TokenStore
from data.vocabulary import VocabularyRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read and in which order. Paths are of token stores (`python -m launch.prepare`).

  sources: (path, weight) of each; weights are shares of rows, of any sum. row_length in tokens.
  at_end: "repeat" reads for ever, each source in a new order every epoch; "stop" ends before any
  source would begin its epoch `num_epochs` + 1, and drops the rows that do not fill a batch.
  eval_source: a held-out store; eval_rows: at most this many of its rows, evenly spaced over it.
  read_threads, prefetch_batches: how far reading runs ahead; they change no batch.
  """

  recorded_as: ClassVar[str] = "data.pipeline.DataConfig"

  sources: tuple[tuple[str, float], ...]
  row_length: int
  seed: int = 0
  at_end: Literal["repeat", "stop"] = "repeat"
  num_epochs: int = 1
  eval_source: str | None = None
  eval_rows: int = 1024
  read_threads: int = 2
  prefetch_batches: int = 8

  def __post_init__(self):
    if not self.sources:
      raise ValueError("DataConfig: sources is empty; give at least one (path, weight)")
    for source in self.sources:
      if not (isinstance(source, Sequence) and len(source) == 2 and isinstance(source[0], str)):
        raise ValueError(f"DataConfig: sources: {source!r} is not a (path, weight)")
      path, weight = source
      if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"DataConfig: sources: weight {weight!r} of {path!r} is not a number")
      if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(
          f"DataConfig: sources: weight {weight!r} of {path!r} must be a finite number above 0; "
          "leave the source out to read nothing of it"
        )
    for name in ("row_length", "num_epochs", "eval_rows", "read_threads", "prefetch_batches"):
      if getattr(self, name) < 1:
        raise ValueError(f"DataConfig: {name} {getattr(self, name)} must be at least 1")
    if self.seed < 0:
      raise ValueError(f"DataConfig: seed {self.seed} must not be negative")
    if self.at_end not in ("repeat", "stop"):
      raise ValueError(f"DataConfig: at_end {self.at_end!r} is neither 'repeat' nor 'stop'")
    if self.at_end == "repeat" and self.num_epochs != 1:
      raise ValueError(
        f"DataConfig: num_epochs {self.num_epochs} has no effect with at_end 'repeat'; "
        "say at_end='stop' to end after so many"
      )


class Batches:
  """An iterator of Batches, read ahead in threads; close it, or use it in a `with`."""

  def __init__(self, read: "_Read", *, start: int, config: DataConfig):
    options = grain.ReadOptions(
      num_threads=config.read_threads, prefetch_buffer_size=config.prefetch_batches
    )
    dataset = grain.MapDataset.source(read).to_iter_dataset(options)
    self._iterator: Any = iter(dataset)
    self._iterator.set_state({"next_index": start})

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def close(self) -> None:
    """Ends the threads; there are no more batches."""
    self._iterator.close()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def train_batches(
  config: DataConfig,
  *,
  batch_size: int,
  start_step: int,
  passed_over: Sequence[int] = (),
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Batches of steps start_step, start_step + 1, ...: this process's rows of each.

  Process p of n gets rows p * batch_size / n and on of the global batch of `batch_size` rows. Row r
  of batch i is row i * batch_size + r of the mixture, and step s (from 0) reads batch
  `position(s, passed_over)`. Processes that hold different times of the same rows have the same p:
  each reads the rows whole (sharding/mesh.py: row_share). The stores are opened and checked at
  once.
  """
  num_steps = num_steps_available(config, batch_size=batch_size, passed_over=passed_over)
  mine = _slice_of(batch_size, process_index, process_count)
  if start_step < 0 or (num_steps is not None and start_step > num_steps):
    raise ValueError(f"train_batches: start_step {start_step} is not in 0 .. {num_steps}")
  mixture = _mixture(config)
  rows = [Rows(TokenStore(path), config.row_length) for path, _ in config.sources]

  def read(step: int) -> Batch:
    first = position(step, passed_over) * batch_size
    return _gather(rows, [mixture.address(first + row) for row in mine])

  # 0 steps are left where all batches are passed over; None is no end.
  length = sys.maxsize if num_steps is None else num_steps
  return Batches(_Read(length, read), start=start_step, config=config)


def position(step: int, passed_over: Sequence[int]) -> int:
  """Which batch step `step` (from 0) reads: number `step` of those that are not passed over."""
  for batch in sorted(set(passed_over)):
    step += batch <= step
  return step


def num_steps_available(
  config: DataConfig, *, batch_size: int, passed_over: Sequence[int] = ()
) -> int | None:
  """Steps until the data ends, the same on all hosts; None if it repeats for ever."""
  if batch_size < 1:
    raise ValueError(f"batch_size {batch_size} must be at least 1")
  mixture = _mixture(config)
  total = sum(mixture.num_rows)
  sources = ", ".join(path for path, _ in config.sources)
  if total < batch_size:
    raise ValueError(
      f"{sources}: {total} rows of {config.row_length} tokens are fewer than a batch of "
      f"{batch_size}; give more text, a smaller batch_size or a smaller row_length"
    )
  if config.at_end == "repeat":
    return None
  available = mixture.num_rows_within(config.num_epochs)
  if available < batch_size:
    raise ValueError(
      f"{sources}: in these proportions the data ends after {available} rows, fewer than a batch "
      f"of {batch_size}; give other weights, more num_epochs or a smaller batch_size"
    )
  num_batches = available // batch_size
  return num_batches - sum(batch < num_batches for batch in set(passed_over))


def batch_addresses(config: DataConfig, *, position: int, batch_size: int) -> list[RowAddress]:
  """The rows of the global batch at `position`, in order; reads manifests only."""
  mixture = _mixture(config)
  return [mixture.address(position * batch_size + row) for row in range(batch_size)]


def read_rows(config: DataConfig, addresses: Sequence[RowAddress]) -> Batch:
  """These rows as they were in the batch, to look at what broke a step."""
  rows = [Rows(TokenStore(path), config.row_length) for path, _ in config.sources]
  return _gather(rows, addresses)


class RowContent(NamedTuple):
  """What is in a row: numbers of the documents in their store, and the row's tokens."""

  documents: range
  tokens: np.ndarray


def row_contents(config: DataConfig, addresses: Sequence[RowAddress]) -> list[RowContent]:
  """The content of the rows at these addresses, for people."""
  rows = [Rows(TokenStore(path), config.row_length) for path, _ in config.sources]
  tokens_BT = _gather(rows, addresses).tokens_BT
  return [
    RowContent(rows[address.source].documents(address.row), tokens_T)
    for address, tokens_T in zip(addresses, tokens_BT)
  ]


def eval_batches(
  config: DataConfig, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Batches:
  """The held-out rows, the same ones in the same order each time, each once over all processes.

  Rows of padding, of weight 0, fill the last batch.
  """
  rows = Rows(TokenStore(_eval_source(config)), config.row_length)
  _same_vocabulary(config)
  mine = _slice_of(batch_size, process_index, process_count)
  num_chosen = min(config.eval_rows, len(rows))
  chosen = np.arange(num_chosen) * len(rows) // max(num_chosen, 1)
  num_batches = -(-len(chosen) // batch_size)
  padded = np.full(num_batches * batch_size, -1, np.int64)
  padded[: len(chosen)] = chosen

  def read(index: int) -> Batch:
    first = index * batch_size
    return rows.read(padded[first + mine.start : first + mine.stop])

  return Batches(_Read(num_batches, read), start=0, config=config)


def bytes_per_target(config: DataConfig) -> float:
  """UTF-8 bytes of held-out text for each target, over the whole held-out store.

  Bits per byte = nats per target / ln 2 / this: exact where all rows are evaluated. bos and eos
  have no bytes; eos is a target, and so is every token but a document's first.
  """
  manifest = token_store.read_manifest(_eval_source(config))
  num_targets = manifest.num_tokens - manifest.num_documents
  if not (num_targets and manifest.text_bytes):
    raise ValueError(
      f"{config.eval_source}: {num_targets} targets for {manifest.text_bytes} bytes of text: "
      "nothing to evaluate on; prepare a larger held-out store"
    )
  return manifest.text_bytes / num_targets


def vocabulary(config: DataConfig) -> VocabularyRecord:
  """The vocabulary of all the config's stores; ValueError if they have more than one."""
  return _same_vocabulary(config)


def vocabulary_file(config: DataConfig) -> bytes:
  """The file of that vocabulary, from the first store that keeps it; empty if none does."""
  _same_vocabulary(config)
  return next(filter(None, map(token_store.vocabulary_file, _paths(config))), b"")


def fingerprints(config: DataConfig) -> dict[str, str]:
  """Path -> fingerprint of each store, the held-out one too; reads manifests only."""
  return {path: token_store.read_manifest(path).fingerprint for path in _paths(config)}


class _Read:
  """What Grain reads from: element i is read(i)."""

  def __init__(self, length: int, read: Callable[[int], Batch]):
    self._length = length
    self._read = read

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Batch:
    return self._read(index)

  def __repr__(self) -> str:
    return f"rows({self._length})"


def _gather(rows: list[Rows], addresses: Sequence[RowAddress]) -> Batch:
  """The rows at these addresses, in their order; one read per source."""
  sources = np.array([address.source for address in addresses])
  indices = np.array([address.row for address in addresses])
  if len(set(sources.tolist())) == 1:
    return rows[sources[0]].read(indices)
  T = rows[0].row_length
  batch = Batch(
    *(np.empty((len(addresses), T), dtype) for dtype in (np.int32, np.int32, np.int32, np.float32))
  )
  for source in set(sources.tolist()):
    for whole, part in zip(batch, rows[source].read(indices[sources == source])):
      whole[sources == source] = part
  return batch


def _mixture(config: DataConfig) -> Mixture:
  _same_vocabulary(config)
  sizes = []
  for path, _ in config.sources:
    sizes.append(num_rows(token_store.read_manifest(path).num_tokens, config.row_length))
    if not sizes[-1]:
      raise ValueError(f"{path}: a single token makes no row; give more text")
  shares = integer_shares(tuple(weight for _, weight in config.sources))
  return Mixture(num_rows=tuple(sizes), shares=shares, seed=config.seed)


def _slice_of(batch_size: int, process_index: int, process_count: int) -> range:
  """Which rows of a batch are this process's."""
  if batch_size < 1:
    raise ValueError(f"batch_size {batch_size} must be at least 1")
  if batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} is not divisible by the number of processes {process_count}"
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index {process_index} is not in 0 .. {process_count - 1}")
  rows_each = batch_size // process_count
  return range(process_index * rows_each, (process_index + 1) * rows_each)


def _paths(config: DataConfig) -> list[str]:
  held_out = [] if config.eval_source is None else [config.eval_source]
  return [path for path, _ in config.sources] + held_out


def _eval_source(config: DataConfig) -> str:
  if config.eval_source is None:
    raise ValueError("DataConfig: eval_source is None: nothing to evaluate on; name a store")
  return config.eval_source


def _same_vocabulary(config: DataConfig) -> VocabularyRecord:
  first, *others = _paths(config)
  record = token_store.read_manifest(first).vocabulary
  for path in others:
    other = token_store.read_manifest(path).vocabulary
    if other != record:
      raise ValueError(
        f"{first} and {path} have different vocabularies: {_describe(record)} and "
        f"{_describe(other)}; prepare both with the same one"
      )
  return record


def _describe(record: VocabularyRecord) -> str:
  """One vocabulary in an error message."""
  return (
    f"{record.kind} of {record.size} (bos {record.bos}, eos {record.eos}, pad {record.pad}, "
    f"fingerprint {record.fingerprint[:12]})"
  )
