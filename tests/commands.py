"""Runs our commands as a shell would, without a new interpreter for each: the other side of tests.

`python -m tests.commands SOCKET` imports everything once, and then forks a process for every
connection to SOCKET, which gives [module, arguments, environment] as JSON and a file for stdout and
stderr: it runs `python -m MODULE ARGUMENTS`. It answers with the process id, and later with how the
process ended; if the connection is closed before, the process is killed. `python -m tests.command`
is the same for those that want a command line.
"""

import contextlib
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import flags

from tests import command
from tests.compiler_flags import FAST_TO_COMPILE

ROOT = pathlib.Path(__file__).parents[1]


class Commands:
  """The tests' side: `start` commands, and `wait` for each."""

  def __init__(self):
    self._folder = tempfile.TemporaryDirectory()
    self.socket = str(pathlib.Path(self._folder.name, "socket"))
    # What one process has compiled, those after it need not: most of a start is that.
    cache = {
      "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(self._folder.name, "compiled")),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-m", "tests.commands", self.socket],
      cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": FAST_TO_COMPILE, **cache},
    )
    end = time.monotonic() + 60.0
    while not pathlib.Path(self.socket).exists():
      assert self._process.poll() is None, "tests.commands died"
      assert time.monotonic() < end, "tests.commands does not start"
      time.sleep(0.02)
    self._running: dict[int, command.Running] = {}

  def start(
    self, module: str, arguments: list[str], output: pathlib.Path, **environment: str
  ) -> int:
    """The process id of the command, whose output goes to `output`."""
    with output.open("wb") as file:
      running = command.start(self.socket, module, arguments, environment, file.fileno())
    self._running[running.pid] = running
    return running.pid

  def wait(self, pid: int | None = None, seconds: float = 120.0) -> int:
    """The exit status of a command (None: of the last), or minus the signal that ended it.

    A command that takes longer is killed: TimeoutError.
    """
    return self._running.pop(list(self._running)[-1] if pid is None else pid).wait(seconds)

  def run(
    self, module: str, arguments: list[str], output: pathlib.Path, **environment: str
  ) -> tuple[int, str]:
    """Exit status and output of a command."""
    status = self.wait(self.start(module, arguments, output, **environment))
    return status, output.read_text()

  def kill_running(self) -> None:
    for running in self._running.values():
      running.close()
    self._running.clear()

  def close(self) -> None:
    self.kill_running()
    self._process.terminate()
    self._process.wait(timeout=60)
    self._folder.cleanup()


def _become(module: str, arguments: list[str], environment: dict[str, str], output: int) -> None:
  os.setsid()
  for number in (signal.SIGCHLD, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
  signal.set_wakeup_fd(-1)
  os.dup2(output, 1)
  os.dup2(output, 2)
  os.environ.update(environment)
  sys.argv = [module, *arguments]
  # What the modules here define by being imported, the command's own module defines again.
  del sys.modules["launch.train"]
  for flag in list(flags.FLAGS.flags_by_module_dict()["launch.train"]):
    delattr(flags.FLAGS, flag.name)
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
  # They take seconds: once, before any fork.
  for name in ("launch.train", "matplotlib.figure"):
    importlib.import_module(name)
  listener = socket.socket(socket.AF_UNIX)
  # Its name is there only once it listens: whoever connects before is refused.
  listener.bind(f"{sys.argv[1]}.new")
  listener.listen(64)
  os.rename(f"{sys.argv[1]}.new", sys.argv[1])
  ended, wakeup = os.pipe()
  for descriptor in (ended, wakeup):
    os.set_blocking(descriptor, False)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
  running: dict[socket.socket, int] = {}
  while True:
    ready, _, _ = select.select([listener, ended, *running], [], [])
    for source in ready:
      if source is listener:
        connection, _ = listener.accept()
        request, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
        pid = os.fork()
        if pid == 0:
          for other in (listener, connection, *running):
            other.close()
          _become(*json.loads(request), descriptors[0])
          os._exit(0)
        os.close(descriptors[0])
        running[connection] = pid
        connection.sendall(f"{pid}\n".encode())
      elif source is ended:
        os.read(ended, 4096)
      else:
        os.kill(running[source], signal.SIGKILL)  # nobody waits for it any more
        source.recv(1)
    for connection, pid in list(running.items()):
      done, status = os.waitpid(pid, os.WNOHANG)
      if done:
        del running[connection]
        with contextlib.suppress(OSError):
          connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()


if __name__ == "__main__":
  main()
