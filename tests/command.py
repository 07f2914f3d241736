"""`python -m tests.command SOCKET MODULE ARGUMENTS...`: `python -m MODULE ARGUMENTS` in moments.

tests/commands.py has imported everything and forks the process; this one passes signals on to it
and ends as it does. The first line of output is its process id. Only the standard library.
"""

import json
import os
import signal
import socket
import sys


class Running:
  """A command that was started."""

  def __init__(self, connection: socket.socket):
    self._connection = connection
    self._lines = connection.makefile()
    self.pid = int(self._lines.readline())

  def wait(self, seconds: float | None = None) -> int:
    """The exit status; minus the signal that ended it. TimeoutError kills it."""
    self._connection.settimeout(seconds)
    try:
      return int(self._lines.readline())
    finally:
      self.close()

  def close(self) -> None:
    """Kills the command if it is still running."""
    self._lines.close()
    self._connection.close()


def start(
  path: str, module: str, arguments: list[str], environment: dict[str, str], output: int
) -> Running:
  """Starts a command with stdout and stderr in the descriptor `output`."""
  connection = socket.socket(socket.AF_UNIX)
  connection.connect(path)
  request = json.dumps([module, arguments, environment]).encode()
  socket.send_fds(connection, [request], [output])
  return Running(connection)


def main() -> int:
  path, module, *arguments = sys.argv[1:]
  running = start(path, module, arguments, {}, 1)
  os.write(1, f"pid {running.pid}\n".encode())
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(running.pid, number))
  status = running.wait()
  if status < 0:
    if -status != signal.SIGKILL:
      signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
  return status


if __name__ == "__main__":
  sys.exit(main())
