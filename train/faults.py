"""What a run does when it is told to stop, and what people can do about a disk."""

import errno
import pathlib
import signal
from types import FrameType
from typing import Any

from absl import logging


class StopRequest:
  """Ctrl-C or SIGTERM: the first asks the loop to save and leave, the second ends at once.

  `with StopRequest() as stop:` and then read `stop.signal_name`, None until a signal came.
  """

  def __init__(self):
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal_name = signal.Signals(number).name
    logging.warning(
      "%s: saving a checkpoint and leaving; once more ends the process at once", self.signal_name
    )
    for other, handler in self._previous.items():
      signal.signal(other, handler)


def storage_advice(error: OSError, workdir: pathlib.Path) -> str:
  """One line: what is wrong with which path, and what to do."""
  what = f"{error.filename or workdir}: {error.strerror or error}"
  match error.errno:
    case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
      do = "free space there"
    case errno.EROFS | errno.EACCES | errno.EPERM:
      do = "let this user write there, or use another --workdir"
    case errno.ENOTDIR | errno.EEXIST:
      do = "a file is where a folder has to be: move it, or use another --workdir"
    case _:
      do = "see that the file system is well"
  return f"{what}. To go on from the last complete checkpoint: {do}, then start the run again"
