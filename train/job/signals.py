"""What a run does when a signal tells it to stop."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from train.job.peers import Peers

_STOPPING = (signal.SIGINT, signal.SIGTERM)
# Slurm and systemd signal every process of a job, and a supervisor passes its signal on.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
  """Ctrl-C or SIGTERM: the first calls `ask` with the signal's name, the second ends this process.

  Signals within a second of the first are the same request, sent by several. Use it in a `with`.
  `ask` may be replaced within it. `signal_name` is the signal that came, or None. A thread listens,
  because the main thread may be in a collective that will not end.
  """

  def __init__(self, ask: Callable[[str], object] = lambda name: None):
    self.ask = ask
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    listening, self._wakeup = socket.socketpair()
    self._wakeup.setblocking(False)
    # Python runs handlers in the main thread; this socket gets the signal's number at once.
    self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno())
    for number in _STOPPING:
      self._previous[number] = signal.signal(number, lambda *_: None)
    threading.Thread(target=self._listen, args=(listening,), name="signals", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_wakeup)
    self._wakeup.close()

  def _listen(self, listening: socket.socket) -> None:
    asked_at: float | None = None
    with listening:
      while received := listening.recv(1):
        if received[0] not in _STOPPING:
          continue
        name = signal.Signals(received[0]).name
        if asked_at is not None:
          if time.monotonic() - asked_at >= SECONDS_OF_ONE_REQUEST:
            Peers.leave(f"{name} again: ended at once", status=128 + received[0])
          continue
        asked_at, self.signal_name = time.monotonic(), name
        logging.warning(
          "%s: saving what is not saved yet and leaving; once more after a second ends the process "
          "at once",
          name,
        )
        self.ask(name)
