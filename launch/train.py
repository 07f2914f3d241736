"""Trains: `python -m launch.train --config=configs/smoke.py --workdir=runs/smoke [--config.x.y=z]`.

The same command continues from the newest checkpoint. Exit status: 0 complete, 75 stopped by a
signal with everything saved (start me again), 76 another process of the job failed (start all
again), 1 stopped by an error, 2 a command that cannot be run.
"""

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags, logging

from data import pipeline, vocabulary
from launch import distributed, host
from launch.console import log_for_people, refuse
from launch.overrides import run_app
from launch.rendezvous import MissingProcessError
from train import replay
from train.bad_steps import BadStepError
from train.checkpoint.checkpoints import SaveFailedError
from train.checkpoint.content import DamagedCheckpointError
from train.config import Run
from train.job.exit_status import LOST, STOPPED
from train.job.peers import Peers
from train.job.signals import StopRequest
from train.loop import Outcome, fit
from train.telemetry.events import process_start
from train.workdir.failure import record_failure, storage_advice
from train.workdir.lock import InUseError
from train.workdir.mirror import Mirror
from train.workdir.place import is_url, local_side

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of checkpoints, metrics and config, or a URL (gs://bucket/run); made if missing.",
  required=True,
)
_LOCAL_WORKDIR = flags.DEFINE_string(
  "local_workdir", None, "For a workdir in a bucket: where small files go first; runs/BUCKET/PATH."
)
_REPLAY_STEP = flags.DEFINE_integer(
  "replay_step", None, "Show this step of the run again and leave; changes nothing.", lower_bound=1
)
_VOCABULARY = flags.DEFINE_string(
  "vocabulary", "byte", "As given to launch.prepare; --replay_step shows the rows as text with it."
)


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  log_for_people()
  with StopRequest(ask=Peers.leave_unbegun) as stop:
    outcome = _train(run, overridden, stop)
  if outcome == "stopped":
    sys.exit(STOPPED)


def _train(run: Run, overridden: dict[str, tuple[Any, Any]], stop: StopRequest) -> Outcome | None:
  """How it ended; None if a step was only shown."""
  place = _WORKDIR.value
  workdir = local_side(_LOCAL_WORKDIR.value or place)
  try:
    if not place:
      # Else its checkpoints would go to /checkpoints.
      raise ValueError("--workdir= is empty: name a folder, or a URL such as gs://bucket/run")
    peers = distributed.join()
  except ValueError as error:
    refuse(error)
  except MissingProcessError as error:
    logging.error("%s", error)
    sys.exit(LOST)
  if peers.count == 1:
    host.keep_memory()
  stop.ask = peers.ask_to_stop
  if peers.index == 0:
    for path, (before, now) in overridden.items():
      logging.info("override %s: %r -> %r", path, before, now)
  saves_to = f"{place.rstrip('/')}/checkpoints"
  mirror = Mirror(workdir, place) if is_url(place) and peers.index == 0 else None
  with _reporting(workdir, peers):
    if _REPLAY_STEP.value is not None:
      if mirror is not None:
        mirror.fetch()
      _show(run, workdir, saves_to, _REPLAY_STEP.value)
      return None
    workdir.mkdir(parents=True, exist_ok=True)
    with mirror or contextlib.nullcontext():
      return fit(
        run,
        workdir,
        peers,
        saves_to=saves_to,
        before_complete=mirror.copy if mirror else lambda: None,
        began=process_start(),
      )


@contextlib.contextmanager
def _reporting(workdir: pathlib.Path, peers: Peers) -> Iterator[None]:
  """Reports a failure to people, to a supervisor (in failure.json) and to the other processes.

  What a user can correct is one line; its traceback is kept beside the run.
  """
  try:
    yield
  # Any exception is reported and raised again.
  except Exception as error:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    peers.failed(line, is_echo=not isinstance(error, ValueError | BadStepError))
    told = _for_people(error, workdir)
    # A workdir that another run has, or that is only looked at, is left as it is.
    if not isinstance(error, InUseError) and _REPLAY_STEP.value is None:
      with contextlib.suppress(OSError):
        record_failure(workdir, step=peers.step, error=line)
      told = told and told + _where(workdir)
    if peers.count > 1:
      if told is None:
        traceback.print_exc()
      peers.leave(told or line, status=1)
    if told is None:
      raise
    logging.error("%s", told)
    if isinstance(error, SaveFailedError | DamagedCheckpointError):
      # At once: the threads of a save that failed wait for the rest of it, possibly for long, and
      # would keep the process alive; unfinished reads of a damaged checkpoint would each print an
      # error as Python ends. Everything else is closed.
      logging.flush()
      os._exit(1)
    sys.exit(1)
  peers.close()


def _for_people(error: Exception, workdir: pathlib.Path) -> str | None:
  """One line for what a user can correct; None for a fault of ours."""
  match error:
    case ValueError() | BadStepError() | SaveFailedError():
      return str(error)
    case OSError():
      return storage_advice(error, workdir)
    case _:
      return None


def _where(workdir: pathlib.Path) -> str:
  """Where the traceback of what is on its way out was written."""
  path = workdir / "error.txt"
  try:
    path.write_text(traceback.format_exc())
  except OSError as error:
    return f" ({path}: {error.strerror})"
  return f" (where: {path})"


def _show(run: Run, workdir: pathlib.Path, saves_to: str, step: int) -> None:
  """What --replay_step prints."""
  words = vocabulary.load(_VOCABULARY.value)
  if words.record != pipeline.vocabulary(run.data):
    logging.info("the rows are of another vocabulary than %s: shown as ids", _VOCABULARY.value)
    words = None
  replayed = replay.replay(run, workdir, step, saves_to=saves_to)
  if jax.process_index() == 0:
    sys.stdout.write("\n".join(replay.lines(replayed, run, words)) + "\n")


if __name__ == "__main__":
  run_app(main)
