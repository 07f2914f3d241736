"""One run at a time writes in a folder."""

import datetime
import fcntl
import os
import pathlib
import socket

from absl import logging


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
    self._file = self.path.open("a+")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      holder = self._read()
      self._file.close()
      raise InUseError(
        f"{directory} is in use by a run ({holder}): wait for it, stop it, or use another workdir"
      ) from error
    except OSError as error:
      logging.warning(
        "%s: this file system has no locks (%s): see to it that one job at a time uses it",
        directory,
        error,
      )
    self._file.truncate(0)
    self._file.write(self._holder + "\n")
    self._file.flush()

  def check(self) -> None:
    """Raises InUseError if another run has taken the folder all the same."""
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

  def _read(self) -> str:
    """Opened anew: a file system over the network shows what others wrote only then."""
    try:
      return self.path.read_text().strip()
    except FileNotFoundError:
      return ""
