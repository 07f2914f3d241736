"""Files that are there whole or not at all, whenever the process is killed or the power goes."""

import contextlib
import os
import pathlib


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Replaces the file at `path`; a reader sees the former content or this one."""
  data = content.encode() if isinstance(content, str) else content
  whole = path.with_name(path.name + ".tmp")
  try:
    with whole.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    whole.replace(path)
  except OSError:
    # What a full disk took of it is of no use.
    with contextlib.suppress(OSError):
      whole.unlink()
    raise
