"""Checkpoints in a bucket, where nothing can be renamed: complete is what has a record.

  CHECKPOINTS/00000500.json               the record, written last: it makes the checkpoint
  CHECKPOINTS/00000500-1a2b3c4d.tmp       arrays that are being written, or removed, or were left
  CHECKPOINTS/damaged-00000500-TIME.json  set aside because it was damaged
  CHECKPOINTS/lock                        who writes here: train/workdir/bucket_lock.py
  CHECKPOINTS_arrays/00000500-1a2b3c4d/   the arrays, zarr 3, a block for each shard

A record names its arrays: a step that is written again never meets the arrays of its former self.
"""

import concurrent.futures
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from data import bucket
from train.job import coordination

_READ_THREADS = 16


class BucketFolder:
  """The place of checkpoints, or of one; it has the methods that checkpoints.py uses of a path."""

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    self.name = self.url.rpartition("/")[2]

  @property
  def parent(self) -> "BucketFolder":
    return BucketFolder(self.url.rpartition("/")[0])

  def __truediv__(self, name: str) -> "BucketFolder":
    return BucketFolder(f"{self.url}/{name}")

  def __str__(self) -> str:
    return self.url

  def exists(self) -> bool:
    return self.read_record() is not None

  def read_record(self) -> bytes | None:
    return bucket.read(f"{self.url}.json")

  def steps(self) -> list[int]:
    found = [re.fullmatch(r"(\d+)\.json", name) for name in bucket.names(self.url)]
    return sorted(int(match[1]) for match in found if match)

  def rename(self, target: "BucketFolder") -> None:
    """Sets a checkpoint aside: what names its arrays has another name."""
    record = self.read_record()
    if record is not None:
      bucket.write(f"{target.url}.json", record)
      bucket.delete(f"{self.url}.json")

  def arrays(self, name: str) -> str:
    """The URL of arrays of that name, of the checkpoints in this place."""
    return f"{self.url}_arrays/{name}"

  def clean_up(self) -> None:
    """Removes arrays that no record has: of a save or a removal that was interrupted."""
    for name in bucket.names(self.url):
      if not name.endswith(".tmp"):
        continue
      arrays = name.removesuffix(".tmp")
      record = (self / arrays.partition("-")[0]).read_record()
      if record is None or _arrays_at(record) != arrays:
        logging.info("removing what an interrupted run left: %s", arrays)
        bucket.delete_below(self.arrays(arrays))
      bucket.delete(f"{self.url}/{name}")

  def forget(self) -> str:
    """Makes this no checkpoint any more; returns the name of its arrays, for `remove_arrays`."""
    arrays = _arrays_at(self.read_record() or b"{}")
    bucket.write(f"{self.parent}/{arrays}.tmp", b"")
    bucket.delete(f"{self.url}.json")
    return arrays

  def remove_arrays(self, name: str) -> None:
    try:
      bucket.delete_below(self.arrays(name))
      bucket.delete(f"{self.url}/{name}.tmp")
    except ValueError as error:
      # The next start tries again; nothing depends on it but space.
      logging.error("%s could not be removed: %s", self.arrays(name), error)


def _arrays_at(record: bytes) -> str:
  return json.loads(record)["arrays_at"]


class Writer:
  """Writes one checkpoint at a time in the background; every process its own shards."""

  def __init__(self, *, timeout_seconds: int, before_complete: Callable[[], object]):
    self._timeout, self._before_complete = timeout_seconds, before_complete
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "write_checkpoint")
    self._writing: concurrent.futures.Future[None] | None = None

  def save(self, folder: BucketFolder, named: dict[str, jax.Array], content: bytes) -> None:
    """Returns when the arrays may be overwritten; `content`, the record, has "arrays_at"."""
    arrays = _arrays_at(content)
    if jax.process_index() == 0:
      bucket.write(f"{folder.parent}/{arrays}.tmp", b"")
    base = folder.parent.arrays(arrays)
    for array in named.values():
      array.copy_to_host_async()
    shards = [
      (f"{base}/{name}", array, [(s.index, np.asarray(s.data)) for s in _ours(array)])
      for name, array in named.items()
    ]
    self._writing = self._thread.submit(self._write, folder, arrays, shards, content)

  def check_for_errors(self) -> None:
    if self._writing is not None and self._writing.done():
      self.wait_until_finished()

  def wait_until_finished(self) -> None:
    writing, self._writing = self._writing, None
    if writing is not None:
      writing.result()

  def close(self) -> None:
    self._thread.shutdown(wait=True)

  def _write(self, folder: BucketFolder, arrays: str, shards: list[Any], content: bytes) -> None:
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
      bucket.write(f"{folder.url}.json", content)
      bucket.delete(f"{folder.parent}/{arrays}.tmp")
    coordination.wait_for_all(f"{arrays} complete", seconds=self._timeout)


def _ours(array: jax.Array) -> list[Any]:
  return [shard for shard in array.addressable_shards if shard.replica_id == 0]


def arrays_name(step: int, number: int) -> str:
  return f"{step:08d}-{number:08x}"


def restore_arrays(
  folder: BucketFolder, named: dict[str, Any], arrays: str
) -> dict[str, jax.Array]:
  """The arrays of a checkpoint with shapes, dtypes and shardings of `named`, read in parallel."""
  base = folder.parent.arrays(arrays)

  def read(name: str) -> jax.Array:
    store, leaf = bucket.open_array(f"{base}/{name}"), named[name]
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: np.asarray(store[index].read().result())
    )

  with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as threads:
    return dict(zip(named, threads.map(read, named)))
