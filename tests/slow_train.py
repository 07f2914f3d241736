"""`python -m tests.slow_train WHAT ARGUMENTS...`: launch.train, 20 steps a second, to be disturbed.

WHAT is "steps", or what else takes seconds: "data", "compile", "evaluate" or "save"; it says so.
"hang=STEP": at that step the data hangs for ever.
"""

import itertools
import runpy
import sys
import time

from data import pipeline
from train import loop, program
from train.checkpoint.folder import FolderWriter

# Where each part is, and its seconds.
PARTS = {
  "data": (pipeline, "train_batches", 8.0),
  "compile": (program, "compile_step", 8.0),
  "evaluate": (loop, "evaluate", 1.0),
  "save": (FolderWriter, "_flush", 1.0),
}


def main() -> None:
  what, _, step = sys.argv.pop(1).partition("=")
  original, calls = program.to_devices, itertools.count(1)
  hangs_at = int(step or 0)

  def to_devices(batch, mesh):
    time.sleep(1000 if next(calls) == hangs_at else 0.05)
    return original(batch, mesh)

  program.to_devices = to_devices
  if what in PARTS:
    _slow_down(what, *PARTS[what])
  runpy.run_module("launch.train", run_name="__main__", alter_sys=True)


def _slow_down(what, owner, name, seconds):
  sound = getattr(owner, name)

  def slow(*positional, **keywords):
    print(f"in {what}", flush=True)
    time.sleep(seconds)
    return sound(*positional, **keywords)

  setattr(owner, name, slow)


if __name__ == "__main__":
  main()
