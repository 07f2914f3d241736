"""Checkpoints in a bucket, where nothing can be renamed: the record makes one complete.

  CHECKPOINTS/00000500.json               the record, written last
  CHECKPOINTS/00000500-1a2b3c4d.tmp       marks arrays that are being written or removed, or were
                                          left by a run that was killed
  CHECKPOINTS/damaged-00000500-TIME.json  set aside because it was damaged
  CHECKPOINTS/lock                        who writes here: train/workdir/bucket_lock.py
  CHECKPOINTS_arrays/00000500-1a2b3c4d/   the arrays, zarr 3, a block for each shard

A record names its arrays, so a step that is written again never mixes with its earlier arrays.
"""

import concurrent.futures
import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from data import bucket
from train.job import coordination
from train.job.broadcast import broadcast
from train.workdir.bucket_lock import BucketLock

_READ_THREADS = 16


class BucketFolder:
  """As train/checkpoint/storage.py: Storage."""

  def __init__(self, url: str):
    self._url = url.rstrip("/")

  def __str__(self) -> str:
    return self._url

  def at(self, step: int) -> str:
    return f"{self._url}/{step:08d}"

  def steps(self) -> list[int]:
    found = [re.fullmatch(r"(\d+)\.json", name) for name in bucket.names(self._url)]
    return sorted(int(match[1]) for match in found if match)

  def exists(self, step: int) -> bool:
    return self.read_record(step) is not None

  def read_record(self, step: int) -> bytes | None:
    return bucket.read(f"{self.at(step)}.json")

  def read_arrays(
    self, step: int, named: dict[str, jax.ShapeDtypeStruct], content: dict[str, Any]
  ) -> dict[str, Any]:
    del step
    base = self.arrays(content["arrays_at"])

    def read(name: str) -> jax.Array:
      store, leaf = bucket.open_array(f"{base}/{name}"), named[name]
      return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: np.asarray(store[index].read().result())
      )

    with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as threads:
      return dict(zip(named, threads.map(read, named)))

  def prepare(self) -> None:
    pass  # a bucket has no folders to make, and no names that are patterns

  def lock(self) -> BucketLock:
    return BucketLock(self._url)

  def writer(
    self, *, timeout_seconds: int, before_complete: Callable[[], object]
  ) -> "BucketWriter":
    return BucketWriter(self, timeout_seconds, before_complete)

  def arrays(self, name: str) -> str:
    """The URL of the arrays of that name."""
    return f"{self._url}_arrays/{name}"

  def mark(self, arrays: str) -> str:
    """The URL of the mark of arrays that are being written or removed. A start that finds it
    finishes what an earlier run began."""
    return f"{self._url}/{arrays}.tmp"

  def marked(self) -> list[str]:
    """The names of arrays with a mark."""
    found = [re.fullmatch(r"(\d+-[0-9a-f]+)\.tmp", name) for name in bucket.names(self._url)]
    return [match[1] for match in found if match]


class BucketWriter:
  """As train/checkpoint/storage.py: Writer; every process writes its own shards."""

  def __init__(
    self, folder: BucketFolder, timeout_seconds: int, before_complete: Callable[[], object]
  ):
    self._folder, self._timeout = folder, timeout_seconds
    self._before_complete = before_complete
    self._remover = concurrent.futures.ThreadPoolExecutor(1, "remove_checkpoints")
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "write_checkpoint")
    self._writing: concurrent.futures.Future[None] | None = None

  def clean_up(self) -> None:
    """Removes arrays that no record has."""
    for arrays in self._folder.marked():
      record = self._folder.read_record(int(arrays.partition("-")[0]))
      if record is None or _arrays_at(record) != arrays:
        logging.info("removing what an interrupted run left: %s", arrays)
        bucket.delete_below(self._folder.arrays(arrays))
      bucket.delete(self._folder.mark(arrays))

  def location(self, step: int) -> dict[str, str]:
    number = int(broadcast(str(secrets.randbits(31))))
    return {"arrays_at": f"{step:08d}-{number:08x}"}

  def save(self, step: int, named: dict[str, jax.Array], content: dict[str, Any]) -> None:
    arrays = content["arrays_at"]
    if jax.process_index() == 0:
      bucket.write(self._folder.mark(arrays), b"")
    base = self._folder.arrays(arrays)
    for array in named.values():
      array.copy_to_host_async()
    shards = [
      (f"{base}/{name}", array, [(s.index, np.asarray(s.data)) for s in _ours(array)])
      for name, array in named.items()
    ]
    record = json.dumps(content).encode()
    self._writing = self._thread.submit(self._write, step, arrays, shards, record)

  def check_for_errors(self) -> None:
    if self._writing is not None and self._writing.done():
      self.wait_until_finished()

  def wait_until_finished(self) -> None:
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def make_durable(self) -> None:
    pass  # an object that appears is durable

  def remove(self, step: int) -> None:
    self._remover.submit(self.remove_arrays, self.forget(step))

  def set_aside(self, step: int, name: str) -> None:
    """Keeps the record under another name; the arrays that it names stay where they are."""
    record = self._folder.read_record(step)
    if record is not None:
      bucket.write(f"{self._folder}/{name}.json", record)
      bucket.delete(f"{self._folder.at(step)}.json")

  def close(self) -> None:
    self._thread.shutdown(wait=True)
    self._remover.shutdown(wait=True)

  def forget(self, step: int) -> str:
    """Removes the record, so that the step has no checkpoint; returns the name of its arrays, for
    `remove_arrays`."""
    arrays = _arrays_at(self._folder.read_record(step) or b"{}")
    bucket.write(self._folder.mark(arrays), b"")
    bucket.delete(f"{self._folder.at(step)}.json")
    return arrays

  def remove_arrays(self, arrays: str) -> None:
    try:
      bucket.delete_below(self._folder.arrays(arrays))
      bucket.delete(self._folder.mark(arrays))
    except ValueError as error:
      # The next start tries again; until then it only takes space.
      logging.error("%s could not be removed: %s", self._folder.arrays(arrays), error)

  def _write(self, step: int, arrays: str, shards: list[Any], record: bytes) -> None:
    pending = []
    for url, array, parts in shards:
      block = array.sharding.shard_shape(array.shape)
      store = bucket.create_array(
        url, shape=array.shape, dtype=np.dtype(array.dtype), block=[max(1, n) for n in block]
      )
      pending += [store[index].write(data) for index, data in parts]
    for write in pending:
      write.result()
    coordination.wait_for_all(f"{arrays} written", seconds=self._timeout)
    if jax.process_index() == 0:
      self._before_complete()
      bucket.write(f"{self._folder.at(step)}.json", record)
      bucket.delete(self._folder.mark(arrays))
    coordination.wait_for_all(f"{arrays} complete", seconds=self._timeout)


def _ours(array: jax.Array) -> list[Any]:
  return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def _arrays_at(record: bytes) -> str:
  return json.loads(record)["arrays_at"]
