"""`kill -9` at any moment: the next start goes on from the last complete checkpoint."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.compiler_flags import FAST_TO_COMPILE
from train.checkpoint.storage import steps

NUM_RANDOM_KILLS = 20
PLACES = (
  "before the arrays are copied",
  "before the folder is renamed",
  "after the folder is renamed",
  "before an old one is removed",
  "while an old one is removed",
)


class Worker:
  """tests/checkpoint_worker.py in a process of its own."""

  def __init__(self):
    flags = f"{FAST_TO_COMPILE} --xla_force_host_platform_device_count=4"
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-m", "tests.checkpoint_worker"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parents[3],
      env={**os.environ, "XLA_FLAGS": flags},
      text=True,
      bufsize=1,
    )

  def start(self, **arguments) -> int:
    defaults = {"directory": None, "result": None, "die_in": None}
    self._process.stdin.write(json.dumps({**defaults, **arguments}) + "\n")
    return self.read("pid")

  def read(self, what: str) -> int:
    """The number in the next line of that kind; other lines before it are ignored."""
    for line in self._process.stdout:
      kind, _, value = line.strip().partition(" ")
      if kind == what:
        return int(value)
      assert kind != "end", f"the run ended with {value}; waiting for {what!r}"
    raise AssertionError(f"the worker died; waiting for {what!r}")

  def close(self) -> None:
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def worker():
  worker = Worker()
  yield worker
  worker.close()


def _finish(worker, directory: pathlib.Path, total_steps: int) -> None:
  """Runs to the end; compares every bit with a run that was never saved or killed."""
  results = {name: directory.parent / f"{name}.npz" for name in ("killed", "undisturbed")}
  last = max(steps(directory), default=0)
  worker.start(directory=str(directory), result=str(results["killed"]), total_steps=total_steps)
  assert worker.read("ready") == last
  assert worker.read("end") == 0
  worker.start(result=str(results["undisturbed"]), total_steps=total_steps)
  assert worker.read("end") == 0
  ours, theirs = np.load(results["killed"]), np.load(results["undisturbed"])
  assert set(ours) == set(theirs) == {"step", "w_DF", "mean_F"}
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name])
  # Nothing half-written or half-removed is left, and no temporary checkpoint.
  kept = [f"{total_steps - 100:08d}", f"{total_steps:08d}", "lock"]
  assert sorted(path.name for path in directory.iterdir()) == kept


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(worker, tmp_path):
  directory, total_steps = tmp_path / "checkpoints", 2000
  moments = random.Random(0)
  last, num_half_written, num_gained = 0, 0, 0
  for kill in range(NUM_RANDOM_KILLS):
    pid = worker.start(directory=str(directory), total_steps=total_steps)
    if kill % 4 == 3:
      # While it starts, cleans up and restores.
      time.sleep(moments.uniform(0.0, 1.0))
    else:
      assert worker.read("ready") == last
      time.sleep(moments.uniform(0.1, 1.3))
    os.kill(pid, signal.SIGKILL)
    assert worker.read("end") == -signal.SIGKILL
    newest = max(steps(directory), default=0)
    assert newest >= last
    num_gained += newest > last
    num_half_written += any(directory.glob("*.orbax-checkpoint-tmp*"))
    last = newest
  # Some kills did hit saves that were under way, and runs that had come further.
  assert num_half_written > 0
  assert num_gained > 2
  _finish(worker, directory, total_steps)


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_every_stage_of_a_save_a_run_loses_nothing_complete(worker, tmp_path, place):
  directory, total_steps = tmp_path / "checkpoints", 200
  worker.start(directory=str(directory), die_in=place, total_steps=total_steps)
  assert worker.read("ready") == 0
  assert worker.read("end") == -signal.SIGKILL
  assert steps(directory), "it died before the first checkpoint"
  _finish(worker, directory, total_steps)
