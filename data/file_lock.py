"""Locks on files: of token stores in the making, of workdirs and of the runs of a sweep.

A lock belongs to an open file. This process holds it, and so does each that inherits the file,
until all of them have closed it or died, however they died. It is in data/ because data/ and train/
both use it, and data/ imports nothing of train/.
"""

import contextlib
import fcntl
import os
import pathlib
from typing import Literal, TextIO

from absl import logging


def open_locked(path: pathlib.Path, mode: Literal["a+", "x+"] = "a+") -> TextIO | None:
  """The file, locked for this process alone; None where another holds it.

  It is made if it is missing, with "x+" only then (FileExistsError). Where the file system has no
  locks, that is logged, and the file comes back without one.
  """
  while True:
    file = path.open(mode)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.close()
      return None
    except OSError as error:
      logging.warning(
        "%s: this file system has no locks (%s): see to it that one job at a time uses it",
        path.parent,
        error,
      )
      return file
    # One that its holder removed after it was opened here would hold nobody back.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()


def is_locked(path: pathlib.Path) -> bool:
  """Whether a living process holds the file; OSError where the file system has no locks."""
  try:
    file = path.open("r+")
  except FileNotFoundError:
    return False
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False
