"""Trains: `python -m launch.train --config=configs/smoke.py --workdir=runs/smoke [--config.x.y=z]`.

The same command again goes on from the newest checkpoint. Exit status: 0 complete, 75 stopped by a
signal with everything saved (start me again), 1 stopped by an error, 2 a command that cannot be
run.
"""

import json
import pathlib
import sys
import traceback
from typing import Any

from absl import flags, logging

from launch.console import log_for_people
from launch.overrides import flatten, run_app
from train.bad_steps import BadStepError
from train.config import Run
from train.events import process_start
from train.loop import fit

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of checkpoints, metrics and config; made if missing.", required=True
)
_STOPPED = 75  # EX_TEMPFAIL: nothing is wrong, start me again.


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  log_for_people()
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  for path, (before, now) in overridden.items():
    logging.info("override %s: %r -> %r", path, before, now)
  (workdir / "config.json").write_text(json.dumps(flatten(run), indent=1, default=repr) + "\n")
  try:
    outcome = fit(run, workdir, began=process_start())
  except (ValueError, BadStepError) as error:
    # What a user can set right is one line; where it came from is kept beside the run.
    (workdir / "error.txt").write_text(traceback.format_exc())
    logging.error("%s (where: %s)", error, workdir / "error.txt")
    sys.exit(1)
  if outcome == "stopped":
    sys.exit(_STOPPED)


if __name__ == "__main__":
  run_app(main)
