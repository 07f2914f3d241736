"""Checkpoints in a folder: Orbax writes them aside, and one is complete when it is renamed.

  CHECKPOINTS/00000500/state/                Orbax (OCDBT): parameters and optimizer as plain dicts
  CHECKPOINTS/00000500/record/record.json    its content: train/checkpoint/content.py
  CHECKPOINTS/00000500.orbax-checkpoint-tmp  being written, or left
  CHECKPOINTS/deleted-00000500-TIME/         being removed, or left
  CHECKPOINTS/damaged-00000500-TIME/         set aside because it was damaged
  CHECKPOINTS/lock                           who writes here: train/workdir/lock.py

All is flushed to disk before the rename. The folder has to be on a file system that all processes
see and that renames folders in one step.
"""

import concurrent.futures
import errno
import functools
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from train.checkpoint.checksums import named_leaves
from train.workdir.lock import Lock

# Orbax finds its own files with glob, and does not escape these characters in the path above them.
_PATTERN = frozenset("*?[\\")


class Folder:
  """As train/checkpoint/storage.py: Storage."""

  def __init__(self, directory: str):
    self.path = pathlib.Path(os.path.abspath(directory))

  def __str__(self) -> str:
    return str(self.path)

  def at(self, step: int) -> str:
    return str(self._of(step))

  def steps(self) -> list[int]:
    if not self.path.is_dir():
      return []
    names = [path.name for path in self.path.iterdir() if path.name.isdecimal()]
    for name in names:
      if name != f"{int(name):08d}":
        raise ValueError(
          f"{self.path / name} is no checkpoint of this program, which would name it "
          f"{int(name):08d}: move it away, or use another workdir"
        )
    return sorted(map(int, names))

  def exists(self, step: int) -> bool:
    return self._of(step).exists()

  def read_record(self, step: int) -> bytes | None:
    try:
      return (self._of(step) / "record" / "record.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
      return None

  def read_arrays(
    self, step: int, named: dict[str, jax.ShapeDtypeStruct], content: dict[str, Any]
  ) -> dict[str, Any]:
    del content
    _quieten_orbax()
    item = _nested(named)
    state = ocp.args.PyTreeRestore(
      item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,  # arrays that are not in `named` are not read
    )
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
      found = checkpointer.restore(self._of(step), args=ocp.args.Composite(state=state))
    return named_leaves(found.state)

  def prepare(self) -> None:
    if wrong := sorted(_PATTERN & set(str(self.path))):
      raise ValueError(
        f"no checkpoint can be written to {self.path}: Orbax takes {' and '.join(wrong)} in a path "
        "for a pattern and would not find what it wrote. Use a workdir without it, also in the "
        "names of the folders above"
      )
    self.path.mkdir(parents=True, exist_ok=True)
    self.steps()  # raises before anything is touched

  def lock(self) -> Lock:
    return Lock(self.path)

  def writer(
    self, *, timeout_seconds: int, before_complete: Callable[[], object]
  ) -> "FolderWriter":
    return FolderWriter(self.path, timeout_seconds, before_complete)

  def _of(self, step: int) -> pathlib.Path:
    return self.path / f"{step:08d}"


class FolderWriter:
  """As train/checkpoint/storage.py: Writer."""

  def __init__(
    self, path: pathlib.Path, timeout_seconds: int, before_complete: Callable[[], object]
  ):
    _quieten_orbax()
    self._path, self._before_complete = path, before_complete
    self._remover = concurrent.futures.ThreadPoolExecutor(1, "remove_checkpoints")
    options = ocp.AsyncOptions(timeout_secs=timeout_seconds, post_finalization_callback=self._flush)
    self._checkpointer = ocp.AsyncCheckpointer(_handler(), async_options=options)

  def clean_up(self) -> None:
    # A set: a name can match both patterns.
    patterns = ("*.orbax-checkpoint-tmp*", "deleted-*")
    for leftover in sorted({path for pattern in patterns for path in self._path.glob(pattern)}):
      logging.info("removing what an interrupted run left: %s", leftover.name)
      if leftover.name.startswith("deleted-"):
        self._remover.submit(remove_tree, leftover)
      else:
        # Renamed first: this run may want to write the same step while it is removed.
        self._discard(leftover)

  def location(self, step: int) -> dict[str, str]:
    del step
    return {}  # beside the record

  def save(self, step: int, named: dict[str, jax.Array], content: dict[str, Any]) -> None:
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_nested(named)), record=ocp.args.JsonSave(content)
    )
    self._checkpointer.save(self._path / f"{step:08d}", args=args)

  def check_for_errors(self) -> None:
    self._checkpointer.check_for_errors()

  def wait_until_finished(self) -> None:
    self._checkpointer.wait_until_finished()

  def make_durable(self) -> None:
    flush_to_disk(self._path)

  def remove(self, step: int) -> None:
    self._discard(self._path / f"{step:08d}")

  def set_aside(self, step: int, name: str) -> None:
    (self._path / f"{step:08d}").rename(self._path / name)

  def close(self) -> None:
    self._checkpointer.close()
    self._remover.shutdown(wait=True)

  def _discard(self, folder: pathlib.Path) -> None:
    """Renames it, so that no folder named like a step is ever incomplete, and removes it later."""
    doomed = self._path / f"deleted-{folder.name}-{time.time_ns()}"
    folder.rename(doomed)
    self._remover.submit(remove_tree, doomed)

  def _flush(self) -> None:
    """Puts a finished, not yet renamed checkpoint on disk: the rename must not get there first."""
    self._before_complete()
    for folder in self._path.glob("*.orbax-checkpoint-tmp*"):
      if jax.process_index() == 0:
        _check_joined(folder)
      for path, _, names in os.walk(folder):
        for name in names:
          flush_to_disk(pathlib.Path(path, name))
        flush_to_disk(pathlib.Path(path))


def flush_to_disk(path: pathlib.Path) -> None:
  """Returns when the content is on the disk; OSError if the disk has failed."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some network file systems cannot flush folders; they keep renames in order themselves.
    if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)


def remove_tree(folder: pathlib.Path) -> None:
  try:
    shutil.rmtree(folder)
  except OSError as error:
    # Its name is not that of a step, so it only takes space.
    logging.error("%s could not be removed: %s", folder, error)


def _check_joined(folder: pathlib.Path) -> None:
  """RuntimeError if Orbax did not join what the processes wrote into readable arrays."""
  for arrays in folder.glob("state*"):
    if not (arrays / "manifest.ocdbt").exists():
      raise RuntimeError(f"{arrays} has no manifest.ocdbt: Orbax did not join what was written")


def _handler() -> ocp.CompositeCheckpointHandler:
  return ocp.CompositeCheckpointHandler(
    state=ocp.StandardCheckpointHandler(),
    record=ocp.JsonCheckpointHandler(filename="record.json"),
  )


def _nested(named: dict[str, Any]) -> dict[str, Any]:
  """Plain nested dicts: the names in a checkpoint do not depend on our classes."""
  tree: dict[str, Any] = {}
  for name, leaf in named.items():
    *parents, last = name.split("/")
    functools.reduce(lambda inner, key: inner.setdefault(key, {}), parents, tree)[last] = leaf
  return tree


def _is_worth_reading(record: Any) -> bool:
  """Whether a log record is shown. Orbax logs every thread of every save at INFO level. Its
  tracebacks are dropped: it also raises these errors, and whoever catches them reports them."""
  if "/orbax/" not in record.pathname:
    return True
  record.exc_info = None
  return record.levelname != "INFO"


@functools.cache
def _quieten_orbax() -> None:
  """Hides Orbax's INFO lines. When one read of a restore fails, it also hides the tracebacks of the
  other reads, which end after Orbax's event loop."""
  logging.get_absl_logger().addFilter(_is_worth_reading)
  show = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      show(unraisable)

  sys.unraisablehook = hook
