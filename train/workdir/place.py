"""Where the small files of a workdir are on this machine; only the standard library."""

import pathlib


def is_url(workdir: str) -> bool:
  """Whether it is a bucket's folder, as "gs://bucket/run" is."""
  return "://" in workdir


def local_side(workdir: str) -> pathlib.Path:
  """The folder for the small files of a workdir: itself, or runs/BUCKET/PATH for a URL."""
  if not is_url(workdir):
    return pathlib.Path(workdir)
  return pathlib.Path("runs", *workdir.partition("://")[2].strip("/").split("/"))
