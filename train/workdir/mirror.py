"""A workdir in a bucket: small files are written on this machine and copied there, all the time.

What only a folder can do (append to metrics.jsonl, TensorBoard, wandb) is done in a local one.
Process 0 copies what has changed into URL/files every ten seconds, before each checkpoint is
complete, and at the end. So a checkpoint in the bucket has all that was told up to its step beside
it: whatever a machine that dies takes with it, the next start does and tells again, but for ten
seconds of events.jsonl. A start on another machine fetches the files first. Checkpoints do not pass
here: train/checkpoint/bucket.py.
"""

import json
import os
import pathlib
import threading
from typing import NamedTuple

from absl import logging

from data import bucket
from train.workdir.failure import FAILURE
from train.workdir.whole_file import write_whole

SECONDS = 10.0
# Of this machine alone: what was copied, and a failure that its supervisor looks for.
_NOTES = "mirror.json"
_NOT_COPIED = {_NOTES, FAILURE}


class _Copied(NamedTuple):
  """A file as it was copied, and the object's generation in hexadecimal digits."""

  size: int
  time_ns: int
  generation: str


class Mirror:
  """Copies `folder` into URL/files as long as it is open; use it in a `with`, on process 0."""

  def __init__(self, folder: pathlib.Path, url: str):
    self._folder, self._url = folder, f"{url.rstrip('/')}/files"
    self._copied = _read_notes(folder / _NOTES)
    self._copying = threading.Lock()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

  def __enter__(self) -> "Mirror":
    self.fetch()
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    self._thread.join()
    self.copy()

  def copy(self) -> None:
    """Copies what has changed; what cannot be copied now is tried again the next time."""
    with self._copying:
      before = dict(self._copied)
      for path in _files(self._folder):
        try:
          self._copy_file(path)
        except (OSError, ValueError) as error:
          logging.warning("%s is not in the bucket yet: %s", path, error)
      if self._copied != before:
        self._write_notes()

  def fetch(self) -> None:
    """Gets what the run left in the bucket, unless what is here goes on from it."""
    for name in bucket.names(self._url):
      path = self._folder / name
      noted = self._copied.get(name) if path.is_file() else None
      found = bucket.read_newer(
        f"{self._url}/{name}", than=bytes.fromhex(noted.generation) if noted else b""
      )
      if found is None:
        continue  # nobody has written it since this machine did
      content, generation = found
      # Whoever was killed before it could note what it had copied, has gone on from it.
      if not (path.is_file() and path.read_bytes().startswith(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        stat = path.stat()
        self._copied[name] = _Copied(stat.st_size, stat.st_mtime_ns, generation.hex())
    self._write_notes()

  def _copy_file(self, path: pathlib.Path) -> None:
    name = path.relative_to(self._folder).as_posix()
    if name in _NOT_COPIED or name.endswith(".tmp"):
      return
    stat = path.stat()
    noted = self._copied.get(name)
    if noted is None or noted[:2] != (stat.st_size, stat.st_mtime_ns):
      generation = bucket.write(f"{self._url}/{name}", path.read_bytes())
      self._copied[name] = _Copied(stat.st_size, stat.st_mtime_ns, generation.hex())

  def _write_notes(self) -> None:
    self._folder.mkdir(parents=True, exist_ok=True)
    write_whole(self._folder / _NOTES, json.dumps(self._copied) + "\n")

  def _run(self) -> None:
    while not self._closed.wait(SECONDS):
      self.copy()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """All that are there now; others may be made and removed meanwhile."""
  return [
    pathlib.Path(where, name)
    for where, _, names in os.walk(folder)
    for name in sorted(names)
    if not pathlib.Path(where, name).is_symlink()
  ]


def _read_notes(path: pathlib.Path) -> dict[str, _Copied]:
  notes = json.loads(path.read_text()) if path.exists() else {}
  return {name: _Copied(*noted) for name, noted in notes.items()}
