"""One run at a time writes in a folder; for one in a bucket: train/workdir/bucket_lock.py."""

import contextlib
import datetime
import os
import pathlib
import socket
from typing import Literal, TextIO

from absl import logging

from data.file_lock import open_locked


class InUseError(ValueError):
  """Another run writes in this folder; the message names it."""


class Lock:
  """This process is the one that writes in `directory`, until `close` or its death of any kind.

  Raises InUseError where another holds it. Where the file system locks for one machine only, or
  not at all (which is said), the newer of two runs takes the folder, and the older one stops in
  `check`, before its next checkpoint.
  """

  def __init__(self, directory: pathlib.Path):
    self.path = directory / "lock"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    self._holder = f"process {os.getpid()} on {socket.gethostname()} since {now}"
    self._file = self._taken("a+")

  def check(self) -> None:
    """Raises InUseError if another run has taken the folder all the same; a lock that somebody has
    removed is taken again."""
    if not self.path.exists():
      with contextlib.suppress(FileExistsError):
        again = self._taken("x+")
        logging.warning("%s was removed while this run was writing there: taken again", self.path)
        self._file.close()
        self._file = again
    holder = self._read()
    if holder != self._holder:
      raise InUseError(
        f"{self.path.parent} was taken by another run ({holder or 'its lock is empty'}) while this "
        f"one ({self._holder}) was writing there: this one stops. Stop the other before you start "
        "it again, or give it another workdir"
      )

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _taken(self, mode: Literal["a+", "x+"]) -> TextIO:
    """The file, locked, with this process's name in it; "x+" only if there is none."""
    file = open_locked(self.path, mode)
    if file is None:
      raise InUseError(
        f"{self.path.parent} is in use by a run ({self._read()}): wait for it, stop it, or use "
        "another workdir"
      )
    file.truncate(0)
    file.write(self._holder + "\n")
    file.flush()
    return file

  def _read(self) -> str:
    """Opened anew: a file system over the network shows what others wrote only then."""
    try:
      return self.path.read_text().strip()
    except FileNotFoundError:
      return ""
