"""Files that are there whole or not at all, whenever the process is killed or the power goes."""

import os
import pathlib


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Replaces the file at `path`; a reader sees the former content or this one."""
  data = content.encode() if isinstance(content, str) else content
  whole = path.with_name(path.name + ".tmp")
  with whole.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  whole.replace(path)
