"""Checkpoints of several processes: one decides when, any number reads them again."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np

from tests import checkpoint_process as job
from tests.compiler_flags import FAST_TO_COMPILE
from train.checkpoint.reading import restore
from train.checkpoint.storage import steps


def two_processes(directory: pathlib.Path | str) -> list[str]:
  """What each of two processes with two devices printed, after both ended well."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    port = listener.getsockname()[1]
  flags = f"{FAST_TO_COMPILE} --xla_force_host_platform_device_count=2"
  environment = {**os.environ, "XLA_FLAGS": flags}
  command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint_process", str(port), "2"]
  processes = [
    subprocess.Popen(
      [*command, str(index), str(directory)],
      cwd=pathlib.Path(__file__).parents[3],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    told = [process.communicate(timeout=100)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], told
  # Gloo talks on the same stdout, sometimes into another line.
  ours = re.compile(r"^(?:start|temporary|permanent) \d+$", re.MULTILINE)
  return ["\n".join(ours.findall(text)) for text in told]


def _straight_on(num_steps: int) -> dict:
  step = jax.jit(job.update)
  state = job.init()
  for _ in range(num_steps):
    state = step(state)
  return state


def test_two_processes_save_as_one_and_one_process_restores_them(tmp_path):
  directory = tmp_path / "checkpoints"
  first, second = two_processes(directory)
  # Process 0 is asked for the time every 16 steps; both hear the same.
  assert first == second == "start 0\ntemporary 16\npermanent 20\ntemporary 32\npermanent 40"
  assert steps(directory) == [20, 40]

  mesh = job.make_mesh()
  restored = restore(directory, 40, job.abstract(mesh))
  expected = _straight_on(40)
  assert int(restored.state["step"]) == 40
  np.testing.assert_array_equal(restored.state["w_DF"], expected["w_DF"])

  # One process goes on, alone it is asked for the time in every step; then two again, and both
  # set the same damaged checkpoint aside.
  job.train(str(directory), num_steps=15)
  assert steps(directory) == [20, 40, 55]
  shutil.rmtree(directory / "00000055" / "record")
  first, second = two_processes(directory)
  assert first == second == "start 40\ntemporary 48\npermanent 60\ntemporary 64\npermanent 80"
  assert steps(directory) == [20, 40, 60, 80]
  restored = restore(directory, 80, job.abstract(mesh))
  np.testing.assert_array_equal(restored.state["w_DF"], _straight_on(80)["w_DF"])
