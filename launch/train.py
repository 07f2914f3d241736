"""Trains: `python -m launch.train --config=configs/smoke.py --workdir=runs/smoke [--config.x.y=z]`.

The same command again goes on from the newest checkpoint. Exit status: 0 complete, 75 stopped by a
signal with everything saved (start me again), 1 stopped by an error, 2 a command that cannot be
run.
"""

import os
import pathlib
import sys
import traceback
from typing import Any

from absl import flags, logging

from data import pipeline, vocabulary
from launch.console import log_for_people
from launch.overrides import run_app
from train import faults, replay
from train.bad_steps import BadStepError
from train.checkpoint import SaveFailedError
from train.checkpoint_folder import InUseError
from train.config import Run
from train.events import process_start
from train.loop import fit

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of checkpoints, metrics and config; made if missing.", required=True
)
_REPLAY_STEP = flags.DEFINE_integer(
  "replay_step", None, "Show this step of the run again and leave; changes nothing.", lower_bound=1
)
_VOCABULARY = flags.DEFINE_string(
  "vocabulary", "byte", "As given to launch.prepare; --replay_step shows the rows as text with it."
)
_STOPPED = 75  # EX_TEMPFAIL: nothing is wrong, start me again.


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  log_for_people()
  workdir = pathlib.Path(_WORKDIR.value)
  for path, (before, now) in overridden.items():
    logging.info("override %s: %r -> %r", path, before, now)
  try:
    if _REPLAY_STEP.value is not None:
      _show(run, workdir, _REPLAY_STEP.value)
      return
    workdir.mkdir(parents=True, exist_ok=True)
    outcome = fit(run, workdir, began=process_start())
  # What a user can set right is one line; where it came from is kept beside the run.
  except InUseError as error:
    logging.error("%s", error)
    sys.exit(1)
  except (ValueError, BadStepError) as error:
    logging.error("%s%s", error, _where(workdir))
    sys.exit(1)
  except SaveFailedError as error:
    logging.error("%s%s", error, _where(workdir))
    # At once: threads of a save that failed wait for the rest of it, for as long as one may take,
    # and would keep the process. Everything else is closed.
    logging.flush()
    os._exit(1)
  except OSError as error:
    logging.error("%s%s", faults.storage_advice(error, workdir), _where(workdir))
    sys.exit(1)
  if outcome == "stopped":
    sys.exit(_STOPPED)


def _show(run: Run, workdir: pathlib.Path, step: int) -> None:
  """What --replay_step prints."""
  words = vocabulary.load(_VOCABULARY.value)
  if words.record != pipeline.vocabulary(run.data):
    logging.info("the rows are of another vocabulary than %s: shown as ids", _VOCABULARY.value)
    words = None
  replayed = replay.replay(run, workdir, step)
  sys.stdout.write("\n".join(replay.lines(replayed, run, words)) + "\n")


def _where(workdir: pathlib.Path) -> str:
  """Where the traceback of what is on its way out was written; nothing if it cannot be."""
  path = workdir / "error.txt"
  if _REPLAY_STEP.value is not None:
    return ""
  try:
    path.write_text(traceback.format_exc())
  except OSError as error:
    return f" ({path}: {error.strerror})"
  return f" (where: {path})"


if __name__ == "__main__":
  run_app(main)
