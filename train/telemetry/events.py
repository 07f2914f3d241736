"""Where the time of a run goes: WORKDIR/events.jsonl, which train/telemetry/goodput.py reads.

Each line ends something: {"time": t, "kind": "compile"} says that from the line before it up to t
(seconds since 1970) the run compiled. So the time is divided without gaps, whatever line is lost.
Lines of steps are one for many: {"kind": "step", "steps": [first, last], "data_wait": seconds}.
Three kinds end nothing: "start" of a process, "resume" from a step, "end" with its outcome.

A process that is killed writes no last line. WORKDIR/heartbeat.json holds, within a second, when it
was alive and what it did; the next start writes that line for it. Lines are not synced to disk: a
killed process loses none, a machine that dies may lose the last ones. Process 0 writes.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging

from train.telemetry.goodput import HEARTBEAT, JSONL, Activity, read

_SECONDS_PER_LINE = 10.0
_SECONDS_PER_BEAT = 1.0
_SHORTEST = 0.002  # what takes fewer seconds is counted with what comes next
_BEAT_BYTES = 96  # always the same, so that one write replaces the last beat
_EPOCH = time.time() - time.monotonic()


def now() -> float:
  """Seconds since 1970 on a clock that never goes back within a process."""
  return _EPOCH + time.monotonic()


def process_start() -> float:
  """When this process began, seconds since 1970, to 10 ms; where there is no /proc, now."""
  try:
    stat = pathlib.Path("/proc/self/stat").read_text()
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
  except FileNotFoundError:
    return now()
  # Field 22; the second is the command's name, which may hold spaces.
  ticks = int(stat.rpartition(")")[2].split()[19])
  return now() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


class Events:
  """Writes the log of one start of a run; use it in a `with`, on every process.

  Open it when no other process can be training in `workdir`. What it begins with is "init" since
  `began`. `about` is kept in the line of the start, for whoever reads the log.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    began: float,
    about: Mapping[str, Any],
    clock: Callable[[], float] = now,
  ):
    self._clock, self._is_open = clock, jax.process_index() == 0
    self._activity: Activity = "init"
    self._steps: list[int] = []
    self._waited = self._kept_seconds = self._earlier_seconds = 0.0
    self._since = began
    self._folder = pathlib.Path(workdir)
    if not self._is_open:
      return
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / JSONL
    before = read(self._folder)
    # The machine's clock was set back since the last start: the log goes on where it ended.
    if (behind := before.end - clock()) > 0:
      self._clock = lambda: clock() + behind
    is_torn = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
    self._file = path.open("a", encoding="utf-8")
    if is_torn:
      self._file.write("\n")
    if before.tail is not None:
      self._write(before.tail)
    self._last = max(began, before.end)
    self._write({"time": self._last, "kind": "start", "pid": os.getpid(), **about})
    self._beat = os.open(self._folder / HEARTBEAT, os.O_WRONLY | os.O_CREAT, 0o666)
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
    self._thread.start()

  @contextlib.contextmanager
  def span(self, activity: Activity, *, step: int | None = None) -> Iterator[None]:
    """The time inside is that of `activity`, but for spans inside it; `step`: after which step."""
    outer = self._activity
    self._switch(activity)
    try:
      yield
    finally:
      self._switch(outer, {} if step is None else {"steps": [step, step]})

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The time inside is waiting for data; it is written with the steps around it."""
    begin = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - begin

  def finished(self, step: int) -> None:
    """The result of a step has arrived; a line is written when the last is some seconds old."""
    if not self._is_open:
      return
    self._steps.append(step)
    if self._clock() - self._last > _SECONDS_PER_LINE:
      self._switch(self._activity)

  def resume(self, step: int) -> None:
    """The run goes on after `step`: what was done of later steps before is lost."""
    if not self._is_open:
      return
    self._switch(self._activity)
    self._write({"time": self._last, "kind": "resume", "step": step})
    shares = read(self._folder).seconds()
    self._kept_seconds, self._earlier_seconds = shares["step"], sum(shares.values())
    self._since = self._last

  def goodput(self) -> float:
    """The share of all time since the first start that went into steps that are not lost."""
    if not self._is_open:
      return 0.0
    at = self._clock()
    running = at - self._last - self._waited if self._activity == "step" else 0.0
    total = self._earlier_seconds + at - self._since
    return (self._kept_seconds + running) / max(total, 1e-9)

  def end(self, outcome: str) -> None:
    """The last line of this start: how it ended."""
    if not self._is_open:
      return
    self._is_open = False
    self._closing.set()
    self._thread.join()
    os.close(self._beat)
    with self._file:
      self._flush({})
      self._write({"time": self._last, "kind": "end", "outcome": outcome})

  def __enter__(self) -> "Events":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      self.end("interrupted" if kind is None else kind.__name__)
    except OSError as error:
      # On a full disk the error that is on its way out says more; this one must not hide it.
      if kind is None:
        raise
      logging.error("%s: %s", self._folder / JSONL, error.strerror)

  def _switch(self, activity: Activity, more: Mapping[str, Any] | None = None) -> None:
    if self._is_open:
      self._flush(more or {})
    self._activity = activity

  def _flush(self, more: Mapping[str, Any]) -> None:
    """Writes the line that ends the activity of now; what took no time needs none."""
    at = self._clock()
    if at - self._last < _SHORTEST and not self._steps:
      return
    line: dict[str, Any] = {"time": at, "kind": self._activity, **more}
    if self._activity == "step":
      self._kept_seconds += at - self._last - self._waited
      if self._steps:
        line["steps"] = [self._steps[0], self._steps[-1]]
      line["data_wait"] = round(self._waited, 4)
      self._steps, self._waited = [], 0.0
    self._write(line)
    self._last = at

  def _write(self, line: Mapping[str, Any]) -> None:
    self._file.write(json.dumps({**line, "time": round(line["time"], 3)}) + "\n")
    self._file.flush()

  def _keep_beating(self) -> None:
    while True:
      beat = json.dumps({"time": round(self._clock(), 3), "kind": self._activity})
      os.pwrite(self._beat, beat.ljust(_BEAT_BYTES - 1).encode() + b"\n", 0)
      if self._closing.wait(_SECONDS_PER_BEAT):
        return
