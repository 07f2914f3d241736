"""Where the checkpoints of a run are: a folder or a bucket, chosen here, with the same methods.

A reader uses `Storage` alone and changes nothing there. The run that writes holds the lock and has
a `Writer`. How a checkpoint becomes complete in one go differs: folder.py and bucket.py.
"""

import os
from collections.abc import Callable
from typing import Any, Protocol

import jax

from data import bucket
from train.checkpoint import content
from train.checkpoint.bucket import BucketFolder
from train.checkpoint.content import DamagedCheckpointError
from train.checkpoint.folder import Folder
from train.workdir.bucket_lock import BucketLock
from train.workdir.lock import Lock


class Writer(Protocol):
  """Writes one checkpoint at a time, in the background; every process of a run has one.

  What a save raises in the background, `check_for_errors` or `wait_until_finished` raises.
  """

  def clean_up(self) -> None:
    """Removes what an interrupted run left half written or half removed; called by process 0."""
    ...

  def location(self, step: int) -> dict[str, str]:
    """What the content of a new checkpoint says about where its arrays are; by all processes."""
    ...

  def save(self, step: int, named: dict[str, jax.Array], content: dict[str, Any]) -> None:
    """Starts writing; returns when the arrays may be overwritten; by all processes.

    `content` is the result of content.py: sealed, with `location` in it. The checkpoint appears
    when all is written and `before_complete` has returned, which process 0 calls in the thread that
    writes.
    """
    ...

  def check_for_errors(self) -> None:
    """Raises if a save has failed since; does not wait."""
    ...

  def wait_until_finished(self) -> None:
    """Returns when nothing is being written; raises if that failed."""
    ...

  def make_durable(self) -> None:
    """Returns when a checkpoint that has appeared survives a loss of power; called by process 0."""
    ...

  def remove(self, step: int) -> None:
    """Takes the step's checkpoint away at once, and its arrays in the background; by process 0."""
    ...

  def set_aside(self, step: int, name: str) -> None:
    """Takes the step's checkpoint away and keeps its files under `name`; called by process 0."""
    ...

  def close(self) -> None:
    """Finishes writing and removing."""
    ...


class Storage(Protocol):
  """The place of a run's checkpoints; str() is its path or URL."""

  def at(self, step: int) -> str:
    """The path or URL of the checkpoint of a step, for messages."""
    ...

  def steps(self) -> list[int]:
    """The steps with a checkpoint, ascending; those still being written do not count.

    ValueError for a step whose name is not written as ours are: another program wrote it.
    """
    ...

  def exists(self, step: int) -> bool:
    """Whether the step has a checkpoint, sound or damaged."""
    ...

  def read_record(self, step: int) -> bytes | None:
    """The `content` that `save` wrote, as JSON; None where there is none."""
    ...

  def read_arrays(
    self, step: int, named: dict[str, jax.ShapeDtypeStruct], content: dict[str, Any]
  ) -> dict[str, Any]:
    """The arrays of `named` and no others, in the layout asked for. Any kind of exception if a file
    cannot be read."""
    ...

  def prepare(self) -> None:
    """Makes the folder; called by all processes. ValueError, before anything is touched, where no
    checkpoint could be read back or where another program's checkpoints are."""
    ...

  def lock(self) -> Lock | BucketLock:
    """Locks the storage for this run; InUseError where another run has it. Called by process 0."""
    ...

  def writer(self, *, timeout_seconds: int, before_complete: Callable[[], object]) -> Writer:
    """`timeout_seconds`: how long a save may wait for the other processes."""
    ...


def storage_at(directory: str | os.PathLike[str]) -> Storage:
  """The storage of a folder, or of a URL such as gs://bucket/run/checkpoints."""
  name = os.fspath(directory)
  return BucketFolder(name) if bucket.is_url(name) else Folder(name)


def steps(directory: str | os.PathLike[str]) -> list[int]:
  """The steps with a checkpoint in a folder or below a URL; as Storage.steps."""
  return storage_at(directory).steps()


def read_content(storage: Storage, step: int) -> dict[str, Any]:
  """The content of a checkpoint (content.py), after checking that it is what was written."""
  record = storage.read_record(step)
  if record is not None:
    return content.parsed(record, where=storage.at(step), step=step)
  if storage.exists(step):
    raise DamagedCheckpointError(
      f"checkpoint {storage.at(step)} is damaged: it has no record/record.json"
    )
  raise ValueError(f"there is no checkpoint {storage.at(step)}; there are: {storage.steps()}")
