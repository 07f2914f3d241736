"""Starts a training command again until it is complete: `python -m launch.supervise -- COMMAND`.

COMMAND's exit status decides: 0 complete; 75 everything is saved, start again at once; 2 it cannot
be run; anything else: start again after a pause that doubles each time. It gives up when the same
failure (WORKDIR/failure.json) comes three times at the same step, and after --max_restarts restarts
in a row without a newer checkpoint. SIGTERM and Ctrl-C are passed on to COMMAND, whose status is
then the exit status: 75 if everything is saved. It imports only the standard library and so starts
in milliseconds, except for a workdir in a bucket, where it looks for the newest checkpoint.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from train.job.exit_status import CANNOT_RUN, STOPPED
from train.workdir.failure import FAILURE, read_failure
from train.workdir.place import is_url, local_side

INTERRUPTED = 128
SAME_FAILURES = 3
_BUCKET_SECONDS = 30.0


@dataclasses.dataclass
class History:
  """What has happened so far, and what to do next."""

  max_restarts: int
  backoff_seconds: float
  max_backoff_seconds: float
  step: int = -1  # of the newest checkpoint
  restarts: int = 0  # since then
  failures: list[tuple[object, object]] = dataclasses.field(default_factory=list)

  def after(self, status: int, step: int, failure: tuple[object, object] | None) -> str | float:
    """Seconds until the next start, or the reason to give up."""
    if step > self.step:
      self.step, self.restarts = step, 0
    if status == CANNOT_RUN:
      return "the command cannot be run"
    self.failures = [*self.failures[-SAME_FAILURES + 1 :], failure] if failure else []
    if len(self.failures) == SAME_FAILURES and len(set(self.failures)) == 1:
      at, error = self.failures[0]
      return f"the same failure {SAME_FAILURES} times at step {at}: {error}"
    if self.restarts >= self.max_restarts:
      return f"{self.restarts} restarts without a newer checkpoint than step {max(self.step, 0)}"
    self.restarts += 1
    if status == STOPPED:
      return 0.0
    return min(self.max_backoff_seconds, self.backoff_seconds * 2.0 ** (self.restarts - 1))


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m launch.supervise", description=__doc__)
  parser.add_argument("--workdir", required=True, help="a folder, or a URL as gs://bucket/run")
  parser.add_argument("--local_workdir", help="as COMMAND has it, for a URL")
  parser.add_argument("--max_restarts", type=_at_least_0(int), default=20)
  parser.add_argument("--backoff_seconds", type=_at_least_0(float), default=5.0)
  parser.add_argument("--max_backoff_seconds", type=_at_least_0(float), default=300.0)
  parser.add_argument("command", nargs="+")
  options = parser.parse_args()
  history = History(options.max_restarts, options.backoff_seconds, options.max_backoff_seconds)
  folder = local_side(options.local_workdir or options.workdir)
  history.step = newest_step(options.workdir)
  signals = _Signals()
  while True:
    with contextlib.suppress(OSError):  # the command reports what is wrong with the folder
      (folder / FAILURE).unlink()
    status = signals.run(options.command)
    if status == 0:
      return 0
    if signals.came:
      _say(f"{signals.came}: the command {ended(status)}")
      # A command that the signal itself ended had not begun training: there is nothing to save.
      if status < 0 and signals.came == signal.Signals(-status).name:
        return STOPPED
      return status if status > 0 else INTERRUPTED - status
    next_step = history.after(status, newest_step(options.workdir), read_failure(folder))
    if isinstance(next_step, str):
      _say(f"the command {ended(status)}; giving up: {next_step}")
      return status if status > 0 else INTERRUPTED - status
    _say(
      f"the command {ended(status)} at step {max(history.step, 0)}; restart {history.restarts} of "
      f"{history.max_restarts} without progress in {next_step:g} s"
    )
    if signals.sleep(next_step):
      return STOPPED


def _at_least_0(kind: Callable[[str], float]) -> Callable[[str], float]:
  """A parser of numbers that are finite and not negative."""

  def read(text: str) -> float:
    value = kind(text)
    if not 0 <= value < float("inf"):
      raise argparse.ArgumentTypeError(f"{text} must be at least 0, and finite")
    return value

  read.__name__ = getattr(kind, "__name__", "number")  # in "invalid int value: 'many'"
  return read


def newest_step(workdir: str) -> int:
  """The step of the newest checkpoint; -1 if there is none, or the bucket does not answer."""
  if is_url(workdir):
    # Imported for buckets only: it takes a while and has to be installed.
    from data import bucket

    try:
      found = bucket.names(f"{workdir}/checkpoints", seconds=_BUCKET_SECONDS)
      names = [name.removesuffix(".json") for name in found]
    except (ValueError, TimeoutError) as error:
      _say(f"{workdir} does not tell its checkpoints: {error}")
      return -1
  else:
    folder = pathlib.Path(workdir, "checkpoints")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return max((int(name) for name in names if name.isdecimal()), default=-1)


class _Signals:
  """Passes SIGTERM and SIGINT on to the command, and remembers that they came."""

  def __init__(self):
    self.came = ""
    self._process: subprocess.Popen[bytes] | None = None
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._on_signal)

  def run(self, command: list[str]) -> int:
    """The command's exit status, minus the signal that ended it."""
    if self.came:
      return STOPPED
    try:
      self._process = subprocess.Popen(
        command,
        start_new_session=True,  # Ctrl-C is ours to pass on
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
      )
    except OSError as error:
      _say(f"{command[0]}: {error}")
      return CANNOT_RUN
    if self.came:
      self._process.send_signal(signal.SIGTERM)
    return self._process.wait()

  def sleep(self, seconds: float) -> bool:
    """Whether a signal came meanwhile."""
    end = time.monotonic() + seconds
    while not self.came and (left := end - time.monotonic()) > 0:
      time.sleep(min(left, 0.2))
    return bool(self.came)

  def _on_signal(self, number: int, frame: object) -> None:
    del frame
    self.came = signal.Signals(number).name
    if self._process is not None and self._process.returncode is None:
      self._process.send_signal(number)


def _die_with_parent() -> None:
  tell_at_parents_death(signal.SIGTERM)


def tell_at_parents_death(number: int) -> None:
  """Has Linux send this process the signal when its parent dies, however it dies."""
  ctypes.CDLL(None).prctl(1, number)


def ended(status: int) -> str:
  """How a command ended, from its exit status (minus the signal that ended it), for people."""
  return f"ended with {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def _say(line: str) -> None:
  print(f"[supervise] {line}", flush=True)


if __name__ == "__main__":
  sys.exit(main())
