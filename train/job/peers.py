"""The processes of a job, as one of them sees the others: which are alive, and when all leave.

At least once a second, a thread of every process reports to the coordination service of jax (in
process 0) that the process is alive, and reads what the others reported. Process 0 judges: when one
has not reported for too long, or any has failed, all leave with a message that names it. Otherwise
they would wait in a collective for ever, or jax would abort them without a name.

  alive/INDEX    a number that grows
  stop/INDEX     why this process wants all to save and leave
  frozen/INDEX   the step this process was at when it read a stop; -1 before its first
  failure/INDEX  how it failed
  trouble/INDEX  the same, where another may have caused it
  verdict        why all have to leave now
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from absl import logging

from train.job.exit_status import LOST, STOPPED

_MAX_BEAT_SECONDS = 1.0
_BEATS_PER_TIMEOUT = 10
_BEATS_OF_A_ROLL_CALL = 4
_NOT_BEGUN = -1
_ABORT_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Peers:
  """All processes of this job. Call `failed` or `close` before this one ends."""

  def __init__(
    self, client: Any, *, index: int, hosts: tuple[str, ...], seconds: float, coordinator: str = ""
  ):
    """`client` is jax's client of the coordination service (None: this is the only process),
    `hosts` are by process index, `seconds` is how long a process may be silent."""
    self.index, self.hosts, self.seconds = index, hosts, seconds
    self.step = 0  # the last that was passed to `reached`
    self._has_begun = False  # `reached` was called
    self._client, self._coordinator = client, coordinator
    self._beat = min(_MAX_BEAT_SECONDS, seconds / _BEATS_PER_TIMEOUT)
    self._closed = threading.Event()
    self._threads: list[threading.Thread] = []
    self._say: dict[str, str] = {}  # to be reported at the next beat
    self._trouble, self._heard = "", threading.Event()
    self._changed = threading.Condition()
    self._freezing, self._stop_at, self.stop_reason = False, None, ""
    now = time.monotonic()
    self._last_answer, self._trouble_since = now, None
    self._seen = {index: ("", now) for index in range(len(hosts))}
    if client is not None:
      self._on_abort = _ABORT_HANDLER(self._aborted)
      ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
      for target in (self._talk, self._listen):
        thread = threading.Thread(target=target, name=f"peers{target.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

  @classmethod
  def alone(cls) -> "Peers":
    """For a job of one process: no thread, no message."""
    return cls(None, index=0, hosts=(socket.gethostname(),), seconds=1.0)

  @property
  def count(self) -> int:
    return len(self.hosts)

  def name(self, index: int) -> str:
    """How messages name a process."""
    return f"process {index} (host {self.hosts[index]})"

  def ask_to_stop(self, reason: str) -> None:
    """Makes `reached` true at the same step on all processes. If none has come to its first step,
    there is nothing to save, and they end at once."""
    if self._client is None:
      with self._changed:
        self.stop_reason, self._stop_at = reason, 0
        if not self._has_begun:
          self.leave_unbegun(reason)
    else:
      self._say.setdefault(f"stop/{self.index}", f"{reason} on {self.name(self.index)}")

  def reached(self, step: int) -> bool:
    """Whether to leave after `step` finished steps, the same on all; call it at every step."""
    with self._changed:
      self.step, self._has_begun = step, True
      while self._freezing:
        self._changed.wait(1.0)
      return self._stop_at is not None and step >= self._stop_at

  def exchange(self, name: str, value: str) -> list[str]:
    """The value of every process, in their order, when all have called it; `name` is used once."""
    if self._client is None:
      return [value]
    self._client.key_value_set(f"{name}/{self.index}", value)
    self._client.wait_at_barrier(name, 24 * 3600 * 1000)  # _judge notices who never comes
    told = self._read(name)
    return [told[str(index)] for index in range(self.count)]

  @classmethod
  def leave_unbegun(cls, reason: str) -> NoReturn:
    """Ends this process, which has no step to save, with the status that asks for a new start."""
    cls.leave(f"{reason} before the first step: there is nothing to save", status=STOPPED)

  @staticmethod
  def leave(message: str, *, status: int = LOST) -> NoReturn:
    """Ends this process at once: a normal exit would wait for the others for minutes, in jax."""
    logging.error("%s", message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

  def failed(self, problem: str, *, is_echo: bool) -> None:
    """Reports to the others that this process has failed, before it ends with its own status.

    With `is_echo` the cause may be another process that is gone: then this one leaves with LOST.
    """
    if self._client is not None:
      self._trouble = problem
      self._say[f"{'trouble' if is_echo else 'failure'}/{self.index}"] = problem
      self._heard.wait(self._beat * (_BEATS_OF_A_ROLL_CALL + 6) + 3.0)

  def close(self) -> None:
    """Call it before this process ends well: the others no longer wait for its reports."""
    self._closed.set()
    for thread in self._threads:
      thread.join(timeout=10.0)

  # In the thread that talks to the service.

  def _talk(self) -> None:
    beat, judged = 0, 0.0
    while not self._closed.wait(0.02 if self._freezing else self._beat):
      beat += 1
      try:
        self._tell(f"alive/{self.index}", str(beat))
        for key, value in list(self._say.items()):
          self._tell(key, value)
          del self._say[key]
        for kind, verdict in self._read("verdict").items():
          self._hear(kind, verdict)
        self._agree()
        if self.index == 0 and time.monotonic() - judged > self._beat / 2:
          judged = time.monotonic()
          self._judge()
        self._last_answer = time.monotonic()
      except jax.errors.JaxRuntimeError as error:
        # A process that has said nothing at all is named by _listen or _aborted.
        logging.log_first_n(logging.WARNING, "the coordination service: %s", 1, error)
    # A process that asks to stop from now on need not wait: this one has done its last step.
    for key, value in (("frozen", str(self.step)), ("alive", "done")):
      self._try_tell(f"{key}/{self.index}", value)

  def _agree(self) -> None:
    """Once a process wants to stop: holds the loop until all know the last step of all."""
    if self._stop_at is not None:
      return
    if not self._freezing:
      reasons = self._read("stop")
      if not reasons:
        return
      with self._changed:
        self._freezing, self.stop_reason = True, min(reasons.items())[1]
        at = self.step if self._has_begun else _NOT_BEGUN
      logging.warning("%s: all save a checkpoint and leave", self.stop_reason)
      self._tell(f"frozen/{self.index}", str(at))
    steps = self._read("frozen")
    if len(steps) == self.count:
      last = max(map(int, steps.values()))
      if last == _NOT_BEGUN:
        self._leave_with_all()
      with self._changed:
        self._freezing, self._stop_at = False, last + 1
        self._changed.notify_all()

  def _leave_with_all(self) -> NoReturn:
    """Process 0 leaves last: the service ends with it, and the others still need the service."""
    self._tell(f"alive/{self.index}", "done")
    end = time.monotonic() + self.seconds
    while self.index == 0 and time.monotonic() < end:
      if set(self._read("alive").values()) == {"done"}:
        time.sleep(self._beat)  # the last may still be about to end
        break
      time.sleep(0.02)
    self.leave_unbegun(self.stop_reason)

  def _judge(self) -> None:
    """Process 0 decides which process is gone or has failed, and is the last to leave."""
    now, alive = time.monotonic(), self._read("alive")
    for index, (value, _) in self._seen.items():
      if (current := alive.get(str(index), "")) != value:
        self._seen[index] = (current, now)
    troubles, patience = self._read("failure"), self.seconds
    if not troubles and (troubles := self._read("trouble")):
      self._trouble_since = self._trouble_since or now
      patience = now - self._trouble_since
      if patience < self._beat * _BEATS_OF_A_ROLL_CALL + 0.5:
        return
      # The last report of a process that died may arrive a beat after the trouble that its death
      # caused; a process that is alive reports at every beat.
      patience -= 2 * self._beat
    gone = [i for i, (value, at) in self._seen.items() if value != "done" and now - at >= patience]
    if not gone and not troubles:
      return
    told = "; ".join(
      f"{self.name(int(i))}: {problem}" for i, problem in sorted(troubles.items())[:4]
    )
    kind, verdict = "failed", told
    if gone:
      who = ", ".join(map(self.name, gone[:8]))
      silent = now - self._seen[gone[0]][1]
      kind, verdict = "gone", f"{who}: gone or hanging, not heard of for {silent:.1f} s"
      verdict += f" ({told})" if told else ""
    self._tell(f"verdict/{kind}", verdict)
    time.sleep(2 * self._beat + 0.2)  # with this process the service ends
    self._hear(kind, verdict)

  def _hear(self, kind: str, verdict: str) -> None:
    """Leaves, unless this process itself has failed: then `failed` returns to its caller."""
    if kind == "gone" or not self._trouble:
      self.leave(f"{verdict}. This process leaves, to be started again with all others")
    self._heard.set()

  # Where process 0 does not answer.

  def _listen(self) -> None:
    while not self._closed.wait(self._beat):
      if (silent := time.monotonic() - self._last_answer) > self.seconds:
        self.leave(f"{self.name(0)}, the coordinator, has not answered for {silent:.1f} s")

  def _aborted(self, number: int) -> None:
    """The handler of SIGABRT, in the thread that aborts: jax aborts as soon as the service is gone,
    and no Python code of ours would run after that."""
    if not self._is_reachable():
      self.leave(f"{self.name(0)}, the coordinator, is gone")
    silent = time.monotonic() - self._last_answer
    if silent > 4 * self._beat + 1:
      self.leave(f"{self.name(0)}, the coordinator, has not answered for {silent:.1f} s")
    # Aborted for another reason, which the log above shows.
    ctypes.CDLL(None).signal(signal.SIGABRT, signal.SIG_DFL)
    os.kill(os.getpid(), number)

  def _is_reachable(self) -> bool:
    host, _, port = self._coordinator.rpartition(":")
    try:
      socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
      return False
    return True

  def _read(self, name: str) -> dict[str, str]:
    """What processes have reported under NAME/, by process index."""
    pairs = self._client.key_value_dir_get(f"{name}/")
    return {key.rpartition("/")[2]: value for key, value in pairs}

  def _tell(self, key: str, value: str) -> None:
    self._client.key_value_set(key, value, allow_overwrite=True)

  def _try_tell(self, key: str, value: str) -> None:
    try:
      self._tell(key, value)
    except jax.errors.JaxRuntimeError as error:
      logging.info("%s could not be told: %s", key, error)
