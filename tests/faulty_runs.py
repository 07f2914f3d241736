"""Runs of tests/faulty_config.py as commands, and what the tests of faults ask of them."""

import json
import os
import pathlib
import subprocess
import sys
import time

from tests.commands import ROOT, Commands
from train.workdir.jsonl import read_jsonl

# The interpreter that launch/local.sh gets: it has imported launch.train already.
_PYTHON = """#!/bin/sh
if [ "$2" = launch.train ]; then
  shift 2
  exec {python} -m tests.command {socket} launch.train "$@"
fi
exec {python} "$@"
"""


class Runs:
  """Runs of tests/faulty_config.py in one folder, as commands."""

  def __init__(self, commands: Commands, folder: pathlib.Path, settings: list[str]):
    self.commands, self.folder, self.settings = commands, folder, settings

  def arguments(self, name: str, *settings: str, fault: str = "") -> list[str]:
    config = f"--config=tests/faulty_config.py:{self.folder}" + (f",{fault}" if fault else "")
    return [config, f"--workdir={self.folder / name}", *self.settings, *settings]

  def run(self, name: str, *settings: str, fault: str = "") -> tuple[int, str]:
    """Exit status and output."""
    arguments = self.arguments(name, *settings, fault=fault)
    output = self.folder / f"{name.replace('/', '-')}.txt"
    return self.commands.run("launch.train", arguments, output)

  def start(self, name: str, *settings: str, fault: str = "") -> int:
    arguments = self.arguments(name, *settings, fault=fault)
    return self.commands.start("launch.train", arguments, self.folder / f"{name}.txt")

  def local_sh(self, name: str, *settings: str, restarts: int = 0) -> tuple[int, str]:
    """Exit status and output of launch/local.sh with two processes."""
    python = self.folder / "python"
    python.write_text(_PYTHON.format(python=sys.executable, socket=self.commands.socket))
    python.chmod(0o755)
    supervise = [f"--max_restarts={restarts}", "--backoff_seconds=0.01"]
    train = [*self.arguments(name, *settings), "--config.mesh.fsdp=2", "--heartbeat_seconds=5"]
    done = subprocess.run(
      ["launch/local.sh", "-n", "2", "--", *supervise, "--", *train],
      cwd=ROOT,
      env={**os.environ, "PYTHON": str(python)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=120,
      check=False,
    )
    return done.returncode, done.stdout

  def losses(self, name: str) -> dict[int, float]:
    """The loss of each step, as text if it is not finite; each step is told once."""
    records = [r for r in read_jsonl(self.folder / name / "metrics.jsonl") if "train/loss" in r]
    assert len(records) == len({record["step"] for record in records})
    return {record["step"]: record["train/loss"] for record in records}

  def json(self, name: str) -> dict:
    return json.loads((self.folder / name).read_text())


def wait_for(is_so, seconds=60.0):
  end = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < end, "nothing happened"
    time.sleep(0.01)


def last_line(output: str) -> str:
  return output.strip().splitlines()[-1]
