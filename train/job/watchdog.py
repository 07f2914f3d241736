"""Ends a process that makes no progress, after writing what each of its threads was doing."""

import dataclasses
import faulthandler
import math
import pathlib
import sys
import threading
import time
from typing import ClassVar

from train.job.peers import Peers
from train.workdir.failure import record_failure

# Native code that never releases the interpreter's lock also blocks the watchdog's thread. After so
# many seconds more, faulthandler ends the process from C.
_SECONDS_BEFORE_FORCE = 60.0
_CHECKS_PER_LIMIT = 20
_MAX_CHECK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
  """How many minutes a run may go without progress; None for no limit.

  step_minutes: from one step to the next, evaluation and waiting for a checkpoint included.
  start_minutes: for each part before that: restoring, compiling, the first step.
  """

  recorded_as: ClassVar[str] = "train.watchdog.WatchdogConfig"

  step_minutes: float | None = 30.0
  start_minutes: float | None = 60.0

  def __post_init__(self):
    for name in ("step_minutes", "start_minutes"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"WatchdogConfig: {name} {value} must be above 0; None is no limit")


class Watchdog:
  """Inside its `with`, ends the process when no progress is reported in time.

  Then WORKDIR/stacks-INDEX.txt and stderr have the stack of every thread, failure.json says where
  it was, the other processes are informed, and the status is LOST: start all again.
  """

  def __init__(self, workdir: pathlib.Path, config: WatchdogConfig, peers: Peers):
    self._workdir, self._config, self._peers = workdir, config, peers
    self._closed = threading.Event()
    self._steps = 0
    self.begins("starting")

  def begins(self, what: str) -> None:
    """A part of the start begins: "restoring" or "compiling"."""
    self._progress(what, self._config.start_minutes)

  def step(self, step: int) -> None:
    """A step is over. Whatever is not compiled yet is compiled after the first one."""
    self._steps += 1
    is_start = self._steps == 1
    minutes = self._config.start_minutes if is_start else self._config.step_minutes
    self._progress(f"after step {step}", minutes)

  def __enter__(self) -> "Watchdog":
    threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()

  def _progress(self, what: str, minutes: float | None) -> None:
    limit = math.inf if minutes is None else 60.0 * minutes
    self._waiting = (what, limit, time.monotonic())

  def _watch(self) -> None:
    while not self._closed.wait(min(_MAX_CHECK_SECONDS, self._waiting[1] / _CHECKS_PER_LIMIT)):
      what, limit, since = self._waiting
      waited = time.monotonic() - since
      if waited > limit:
        self._expired(what, waited)
      if math.isfinite(limit):
        faulthandler.dump_traceback_later(limit - waited + _SECONDS_BEFORE_FORCE, exit=True)
    faulthandler.cancel_dump_traceback_later()

  def _expired(self, what: str, waited: float) -> None:
    problem = f"no progress for {waited:.1f} s {what}"
    path = self._workdir / f"stacks-{self._peers.index}.txt"
    with path.open("w") as file:
      file.write(f"{self._peers.name(self._peers.index)}: {problem}\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
    sys.stderr.write(path.read_text())
    # Without the seconds: a supervisor looks whether it is the same failure as the last time.
    record_failure(self._workdir, step=self._peers.step, error=f"no progress {what}")
    message = f"{problem}; what its threads were doing: {path}"
    self._peers.failed(message, is_echo=True)
    self._peers.leave(message)
