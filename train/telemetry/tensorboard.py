"""Scalars in TensorBoard's files, written in the thread that calls.

A writer thread would die of a full disk and leave its callers waiting for ever. What it had not
written when the process is killed would be missing after every restart.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

# Their generated code declares no names.
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]
Summary: Any = vars(summary_pb2)["Summary"]


class EventFile:
  """A new file in `folder`, or the end of one that was made in this second. TensorBoard hides what
  earlier files have of steps after `start_step`."""

  def __init__(self, folder: pathlib.Path, start_step: int):
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads them in the order of their names.
    path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
    self._file = path.open("ab")
    self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
    start = SessionLog(status=SessionLog.START)
    self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=start))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Returns when the values of a step are in the file; OSError if they cannot be."""
    shown = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
    self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=shown)))

  def close(self) -> None:
    self._file.close()

  def _write(self, event: Any) -> None:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    self._file.write(length + sums[0] + data + sums[1])
    self._file.flush()
