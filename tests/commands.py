"""Runs our commands as a shell would, without a new interpreter for each: the other side of tests.

`python -m tests.commands` imports everything once, and then forks a process for every line of JSON
on stdin, [module, arguments, output file]: it runs `python -m MODULE ARGUMENTS` with stdout and
stderr in that file. It answers with the process id, and later with how the process ended.
"""

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import threading

from absl import flags

from tests.compiler_flags import FAST_TO_COMPILE

ROOT = pathlib.Path(__file__).parents[1]


class Commands:
  """The tests' side: `start` one command at a time, then `wait` for it."""

  def __init__(self):
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-m", "tests.commands"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": FAST_TO_COMPILE},
      text=True,
      bufsize=1,
    )

  def start(self, module: str, arguments: list[str], output: pathlib.Path) -> int:
    """The process id of the command, whose output goes to `output`."""
    self._process.stdin.write(json.dumps([module, arguments, str(output)]) + "\n")
    return self._number()

  def wait(self, seconds: float = 120.0) -> int:
    """The exit status of the command that was started last; minus the signal that ended it."""
    timer = threading.Timer(seconds, self._process.kill)
    timer.start()
    try:
      return self._number()
    finally:
      timer.cancel()

  def run(self, module: str, arguments: list[str], output: pathlib.Path) -> tuple[int, str]:
    """Exit status and output of a command."""
    self.start(module, arguments, output)
    return self.wait(), output.read_text()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait(timeout=60)

  def _number(self) -> int:
    line = self._process.stdout.readline()
    assert line, "tests.commands died, or its command took too long"
    return int(line)


def _become(module: str, arguments: list[str], output: str) -> None:
  descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  sys.argv = [module, *arguments]
  # What the modules here define by being imported, the command's own module defines again.
  del sys.modules["launch.train"]
  for flag in list(flags.FLAGS.flags_by_module_dict()["launch.train"]):
    delattr(flags.FLAGS, flag.name)
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
  # Take seconds: once, before any fork.
  importlib.import_module("launch.train")
  importlib.import_module("matplotlib.figure")
  for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
      _become(*json.loads(line))
      os._exit(0)
    os.write(1, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
  main()
