"""`python -m tests.slow_train STEP ARGUMENTS...`: launch.train, 20 steps a second, to be disturbed.

At STEP (0: none) the data hangs for ever.
"""

import itertools
import runpy
import sys
import time

from train import program


def main() -> None:
  hangs_at = int(sys.argv.pop(1))
  original, calls = program.to_devices, itertools.count(1)

  def to_devices(batch, mesh):
    time.sleep(1000 if next(calls) == hangs_at else 0.05)
    return original(batch, mesh)

  program.to_devices = to_devices
  runpy.run_module("launch.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
