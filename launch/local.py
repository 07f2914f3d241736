"""Several processes of one job on this machine: `python -m launch.local -n 4 -- COMMAND...`.

Runs COMMAND --coordinator=... --num_processes=4 --process_id=I for every I, with "[I] " before
each line of output. When one fails, the others get --grace_seconds to leave by themselves and are
then killed. Signals are passed on to all. Exit status: 0 complete, 75 stopped with everything
saved, 1 or 2 if a process ends with that, else 76. It imports only the standard library and so
starts in milliseconds.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from launch.supervise import ended, tell_at_parents_death
from train.job.exit_status import LOST, STOPPED

_POLL_SECONDS = 0.02


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m launch.local", description=__doc__)
  parser.add_argument("-n", "--processes", type=int, default=2)
  parser.add_argument("--grace_seconds", type=float, default=30.0)
  parser.add_argument("command", nargs="+")
  options = parser.parse_args()
  if options.processes < 1:
    parser.error(f"-n {options.processes} must be at least 1")
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  processes = [
    _start(options.command, port, options.processes, i) for i in range(options.processes)
  ]
  passed_on = _pass_signals_on(processes)
  readers = [
    threading.Thread(target=_copy, args=(index, process), daemon=True)
    for index, process in enumerate(processes)
  ]
  for reader in readers:
    reader.start()
  statuses = _wait(processes, options.grace_seconds)
  for reader in readers:
    reader.join(timeout=5.0)
  return combined([STOPPED if -status in passed_on else status for status in statuses])


def combined(statuses: list[int]) -> int:
  """The status of the job, from those of its processes (negative: the signal that ended it)."""
  if all(status == 0 for status in statuses):
    return 0
  if all(status in (0, STOPPED) for status in statuses):
    return STOPPED
  # The status of the process that failed says more than those of the others, which left because of
  # it.
  return next((status for status in (2, 1) if status in statuses), LOST)


def _start(command: list[str], port: int, count: int, index: int) -> subprocess.Popen[bytes]:
  place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]
  return subprocess.Popen(
    [*command, *(place if count > 1 else [])],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    start_new_session=True,  # Ctrl-C is ours to pass on
    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
  )


def _die_with_parent() -> None:
  tell_at_parents_death(signal.SIGKILL)


def _pass_signals_on(processes: list[subprocess.Popen[bytes]]) -> set[int]:
  """The signals so far. A process that one of them ended had not begun: nothing was to save."""
  came: set[int] = set()

  def pass_on(number: int, frame: object) -> None:
    del frame
    came.add(number)
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, pass_on)
  return came


def _copy(index: int, process: subprocess.Popen[bytes]) -> None:
  assert process.stdout is not None
  for line in process.stdout:
    # One write for each line: those of several processes do not mix.
    os.write(1, b"[%d] " % index + line.rstrip(b"\n") + b"\n")


def _wait(processes: list[subprocess.Popen[bytes]], grace_seconds: float) -> list[int]:
  """The status of each, once all have ended."""
  told: set[int] = set()
  kill_at = None
  while len(told) < len(processes):
    time.sleep(_POLL_SECONDS)
    for index, process in enumerate(processes):
      if index in told or (status := process.poll()) is None:
        continue
      told.add(index)
      if status not in (0, STOPPED):
        _say(f"process {index} {ended(status)}")
        kill_at = kill_at or time.monotonic() + grace_seconds
    if kill_at is not None and time.monotonic() > kill_at:
      kill_at = None
      left = [index for index in range(len(processes)) if index not in told]
      for index in left:
        _say(f"process {index} has not left in {grace_seconds:g} s: killed")
        processes[index].kill()
  return [process.wait() for process in processes]


def _say(line: str) -> None:
  os.write(1, f"[local] {line}\n".encode())


if __name__ == "__main__":
  sys.exit(main())
