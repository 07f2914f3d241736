"""A workdir in a bucket: small files are written on this machine and copied there, all the time.

What only a folder can do (append to metrics.jsonl, TensorBoard, wandb) is done in a local one, and
process 0 copies what has changed into URL/files every few seconds, and at the end. A start on
another machine fetches them first. Checkpoints do not pass here: train/checkpoint_bucket.py.
"""

import pathlib
import threading

from absl import logging

from data import bucket

SECONDS = 10.0


def local_side(workdir: str) -> pathlib.Path:
  """The folder for the small files of a workdir: itself, or runs/BUCKET/PATH for a URL."""
  if not bucket.is_url(workdir):
    return pathlib.Path(workdir)
  return pathlib.Path("runs", *workdir.partition("://")[2].strip("/").split("/"))


class Mirror:
  """Copies `folder` into URL/files as long as it is open; use it in a `with`, on process 0."""

  def __init__(self, folder: pathlib.Path, url: str):
    self._folder, self._url = folder, f"{url.rstrip('/')}/files"
    self._copied: dict[str, tuple[int, int]] = {}  # name -> size and time of what is there
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

  def __enter__(self) -> "Mirror":
    self._fetch()
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    self._thread.join()
    self.copy()

  def copy(self) -> None:
    """Copies what has changed; what cannot be copied now is tried again the next time."""
    for path in sorted(self._folder.rglob("*")):
      name = path.relative_to(self._folder).as_posix()
      try:
        if path.is_symlink() or not path.is_file():
          continue
        stat = path.stat()
        now = (stat.st_size, stat.st_mtime_ns)
        if self._copied.get(name) != now:
          bucket.write(f"{self._url}/{name}", path.read_bytes())
          self._copied[name] = now
      except (OSError, ValueError) as error:
        logging.warning("%s is not in the bucket yet: %s", path, error)

  def _fetch(self) -> None:
    """Gets what the run left in the bucket, unless what is here goes on from it."""
    for name in bucket.names(self._url):
      content = bucket.read(f"{self._url}/{name}") or b""
      path = self._folder / name
      if path.is_file() and path.read_bytes().startswith(content):
        continue
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)

  def _run(self) -> None:
    while not self._closed.wait(SECONDS):
      self.copy()
