"""One run at a time writes below a URL of a bucket, which locks nothing by itself."""

import os
import re
import secrets
import socket
import threading
import time

from absl import logging

from data import bucket
from train.workdir.lock import InUseError

# A lock that was not renewed for two of these is of a dead process.
HEARTBEAT_SECONDS = 10.0


class BucketLock:
  """As train/workdir/lock.py: Lock, for the URL of a folder. A thread renews it all the time, and
  ends this process when another has taken it; when its process dies, it is held until a renewal is
  overdue."""

  def __init__(self, url: str):
    self._place, self._url = url, f"{url}/lock"
    self._holder = (
      f"process {os.getpid()} on {socket.gethostname()}, lock {secrets.randbits(31):08x}"
    )
    self._generation = self._take()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._renew, name="renew_lock", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises InUseError if another run has taken the lock, and perhaps given it back."""
    holder, generation = self._read()
    if generation is None:
      raise InUseError(
        f"{self._place} was taken by another run ({holder}) while this one ({self._holder}) was "
        "writing there: this one stops. Stop the other before you start it again, or give it "
        "another workdir"
      )

  def close(self) -> None:
    self._closed.set()
    self._thread.join()
    _, generation = self._read()
    if generation is not None:
      bucket.delete(self._url, of=generation)

  def _take(self) -> bytes:
    seen = bucket.generation(self._url)
    holder = bucket.read(self._url)
    if holder is not None and not _is_dead(holder.decode()):
      logging.info("%s was held by %s: waiting whether it is renewed", self._url, holder.decode())
      time.sleep(2 * HEARTBEAT_SECONDS)
    taken = self._write(of=seen)
    if taken is None:
      holder, _ = self._read()
      raise InUseError(
        f"{self._place} is in use by a run ({holder}): wait for it, stop it, or use another workdir"
      )
    return taken

  def _write(self, *, of: bytes) -> bytes | None:
    """The generation of the lock with this one's name in it; None if it is not this one's."""
    written = bucket.replace(self._url, self._holder.encode(), of=of)
    if written is None:
      # A write whose answer was lost is done, and refused when it is tried again.
      _, written = self._read()
    return written

  def _read(self) -> tuple[str, bytes | None]:
    """Who has the lock, and its generation if that is this one."""
    found = bucket.read_newer(self._url, than=b"")
    if found is None:
      return "one that has just ended", None
    content, generation = found
    return content.decode(), generation if content == self._holder.encode() else None

  def _renew(self) -> None:
    while not self._closed.wait(HEARTBEAT_SECONDS):
      try:
        renewed = self._write(of=self._generation)
      except ValueError as error:
        logging.warning("%s: not renewed (%s)", self._url, error)
        continue
      if renewed is None:
        logging.error("%s was taken by another run: this one must not write any more", self._url)
        os._exit(1)
      self._generation = renewed


def _is_dead(holder: str) -> bool:
  """Whether it is known at once: a process of this host that is not there any more."""
  match = re.fullmatch(r"process (\d+) on ([^,]*).*", holder)
  if match is None or match[2] != socket.gethostname():
    return False
  try:
    os.kill(int(match[1]), 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    return False
  return False
