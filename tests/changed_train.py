"""`python -m tests.changed_train TREE ARGUMENTS...`: launch.train, as if TREE had its sources."""

import pathlib
import runpy
import sys

from train.job import agreement


def main() -> None:
  agreement._ROOT = pathlib.Path(sys.argv.pop(1))
  runpy.run_module("launch.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
