"""Runs what is left of a sweep as processes, a few at a time; the sweep itself may be killed.

A run inherits an open file with a lock on SWEEP/runs/NAME/running, and so holds the lock as long as
it lives, whatever happens to the process that started it. A sweep that is started again finds the
runs that are still going, waits for them, and never starts one twice.
"""

import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from data.file_lock import is_locked, open_locked
from train.job.exit_status import CANNOT_RUN, STOPPED
from train.job.signals import StopRequest
from train.scaling.sweep import Record, State, read_result
from train.workdir.lock import InUseError

OUTPUT = "output.log"
_POLL_SECONDS = 0.1
# A run that is asked to stop saves a checkpoint first.
_STOP_SECONDS = 120.0

Command = Callable[[str], list[str]]


class _Child(NamedTuple):
  """A run that is under way; `process` is None for one that an earlier sweep started."""

  process: subprocess.Popen[bytes] | None
  start: float


def is_running(folder: pathlib.Path) -> bool:
  """Whether a process that holds the run's lock is alive on this machine."""
  return is_locked(folder / "running")


def collect(state: State) -> None:
  """Copies the results of runs that have finished since, wherever they ran."""
  for name, record in state.in_grid.items():
    if record["result"] is None:
      record["result"] = read_result(state.run_folder(name), record["steps"])


class Runner:
  """Runs those of `state` that have no result and fewer than `max_attempts` failures."""

  def __init__(self, state: State, command: Command, *, jobs: int, max_attempts: int):
    self.state, self.command, self.jobs, self.max_attempts = state, command, jobs, max_attempts
    self._children: dict[str, _Child] = {}

  def run(self, stop: StopRequest) -> None:
    """Returns when nothing is left to do, or once every run has saved after a signal."""
    for name, record in self.state.in_grid.items():
      if record["result"] is None and is_running(self.state.run_folder(name)):
        logging.info("%s: still running, started by a sweep before; waiting for it", name)
        self._children[name] = _Child(None, time.monotonic())
    while stop.signal_name is None:
      for name in list(self._children):
        self._look_after(name)
      # There may be more than that, if an earlier sweep left some running.
      for name in self._left()[: max(0, self.jobs - len(self._children))]:
        self._start(name)
      if not self._children:
        return
      time.sleep(_POLL_SECONDS)
    self._stop_all(stop)

  def _left(self) -> list[str]:
    return [
      name
      for name, record in self.state.in_grid.items()
      if record["result"] is None
      and record["submitted"] is None
      and record["attempts"] < self.max_attempts
      and name not in self._children
    ]

  def _start(self, name: str) -> None:
    folder = self.state.run_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    command = self.command(name)
    attempt = self.state.runs[name]["attempts"] + 1
    lock = open_locked(folder / "running")
    if lock is None:
      raise InUseError(f"{folder} is in use: a process of an earlier start lives; wait for it")
    with lock, (folder / OUTPUT).open("ab") as output:
      # In a session of its own: Ctrl-C reaches only this process, which asks its runs to save.
      process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=[lock.fileno()],
        start_new_session=True,
      )
    self._children[name] = _Child(process, time.monotonic())
    again = f", attempt {attempt} of {self.max_attempts}" if attempt > 1 else ""
    logging.info("%s: started%s (%s)", name, again, self._progress())
    logging.debug("%s", shlex.join(command))

  def _look_after(self, name: str) -> None:
    """Copies the result of a run that has ended, or counts its failure."""
    child, folder = self._children[name], self.state.run_folder(name)
    status = child.process.poll() if child.process is not None else None
    if (status is None) if child.process is not None else is_running(folder):
      return
    del self._children[name]
    record = self.state.runs[name]
    record["seconds"] += time.monotonic() - child.start
    record["result"] = read_result(folder, record["steps"])
    if record["result"] is not None:
      logging.info("%s: loss %.4f (%s)", name, record["result"]["loss"], self._progress())
    elif status == STOPPED:
      logging.info("%s: stopped with everything saved; it goes on", name)
    else:
      record["attempts"] = self.max_attempts if status == CANNOT_RUN else record["attempts"] + 1
      logging.warning("%s: %s", name, failure(record, folder, status, self.max_attempts))
    self.state.save()

  def _progress(self) -> str:
    records = self.state.in_grid.values()
    return f"{sum(one['result'] is not None for one in records)} of {len(records)} runs done"

  def _stop_all(self, stop: StopRequest) -> None:
    """Asks every run to save and leave. Those that do not in time are left running for the next."""
    logging.info("%s: %d runs are told to save and leave", stop.signal_name, len(self._children))
    for name, child in self._children.items():
      if child.process is None:
        logging.warning("%s: not started here, so left running", name)
      elif child.process.poll() is None:
        os.killpg(child.process.pid, signal.SIGTERM)
    end = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < end and any(
      child.process is not None and child.process.poll() is None
      for child in self._children.values()
    ):
      time.sleep(_POLL_SECONDS)
    now = time.monotonic()
    for name, child in self._children.items():
      record = self.state.runs[name]
      record["seconds"] += now - child.start
      record["result"] = read_result(self.state.run_folder(name), record["steps"])
    self.state.save()


def submit(state: State, command: Command, names: Sequence[str], *, max_attempts: int) -> None:
  """Submits each of these runs to a cluster: `command` returns once the run is accepted, and its
  output is kept. A run that is not accepted counts as one failure."""
  for name in names:
    record, folder = state.runs[name], state.run_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
      command(name), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    said = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
      record["submitted"] = {"time": round(time.time()), "said": said}
      logging.info("%s: submitted: %s", name, said.splitlines()[-1] if said else "(no answer)")
    else:
      record["attempts"] = min(max_attempts, record["attempts"] + 1)
      logging.warning("%s: not accepted, exit status %d: %s", name, done.returncode, said)
    state.save()


def failure(record: Record, folder: pathlib.Path, status: int | None, max_attempts: int) -> str:
  """Why a run has no result, and what happens next, in one line."""
  if status is None:
    what = "ended before its last step"
  elif status < 0:
    what = f"killed by {signal.Signals(-status).name}"
  elif status == 0:
    what = f"ended well, without a finite eval/loss of step {record['steps']}"
  else:
    what = f"failed with exit status {status}"
  lines = (folder / OUTPUT).read_bytes().decode(errors="replace").strip().splitlines()
  last = f": {lines[-1].strip()}" if lines and status != 0 else ""
  left = max_attempts - record["attempts"]
  then = f"{left} attempts left" if left > 0 else "given up; --retry_failed tries it again"
  return f"{what}{last} (all of it: {folder / OUTPUT}). {then}"


def expand(template: str, values: Mapping[str, str]) -> list[str]:
  """The words of a command with {key} replaced; ValueError for a key that is not there."""
  try:
    return [word.format_map(values) for word in shlex.split(template)]
  except (KeyError, IndexError, ValueError) as error:
    known = ", ".join(f"{{{key}}}" for key in values)
    raise ValueError(f"command {template!r}: {error}; it may hold {known}") from error
