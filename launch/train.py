"""Trains: `python -m launch.train --config=configs/smoke.py --workdir=runs/smoke [--config.x.y=z]`.

The same command again goes on from the newest checkpoint. Exit status: 0 complete, 75 stopped by a
signal with everything saved (start me again), 76 another process of the job is to blame (start all
again), 1 stopped by an error, 2 a command that cannot be run.
"""

import contextlib
import json
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags, logging

from data import bucket
from launch import distributed
from launch.console import log_for_people
from launch.overrides import flatten, refuse, run_app
from launch.rendezvous import MissingProcessError
from train.config import Run
from train.events import process_start
from train.faults import NonFiniteError, record_failure
from train.loop import fit
from train.mirror import Mirror, local_side
from train.peers import LOST, Peers

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of checkpoints, metrics and config, or a URL (gs://bucket/run); made if missing.",
  required=True,
)
_LOCAL_WORKDIR = flags.DEFINE_string(
  "local_workdir", None, "For a workdir in a bucket: where small files go first; runs/BUCKET/PATH."
)
_STOPPED = 75  # EX_TEMPFAIL: nothing is wrong, start me again.


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  log_for_people()
  place = _WORKDIR.value
  workdir = local_side(_LOCAL_WORKDIR.value or place)
  workdir.mkdir(parents=True, exist_ok=True)
  try:
    peers = distributed.join()
  except ValueError as error:
    refuse(error)
  except MissingProcessError as error:
    logging.error("%s", error)
    sys.exit(LOST)
  is_mirrored = bucket.is_url(place) and peers.index == 0
  with (
    _reporting(workdir, peers),
    Mirror(workdir, place) if is_mirrored else contextlib.nullcontext(),
  ):
    if peers.index == 0:
      for path, (before, now) in overridden.items():
        logging.info("override %s: %r -> %r", path, before, now)
      settings = json.dumps(flatten(run), indent=1, default=repr)
      (workdir / "config.json").write_text(settings + "\n")
    saves_to = f"{place.rstrip('/')}/checkpoints"
    outcome = fit(run, workdir, peers, saves_to=saves_to, began=process_start())
  if outcome == "stopped":
    sys.exit(_STOPPED)


@contextlib.contextmanager
def _reporting(workdir: pathlib.Path, peers: Peers) -> Iterator[None]:
  """Tells people, a supervisor (by failure.json) and the other processes of a failure.

  What a user can set right is one line; where it came from is kept beside the run.
  """
  try:
    yield
  # Whatever it is, it is told and goes on its way.
  except Exception as error:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    is_for_the_user = isinstance(error, ValueError | NonFiniteError)
    peers.failed(line, is_echo=not is_for_the_user)
    record_failure(workdir, step=peers.step, error=line)
    if is_for_the_user:
      (workdir / "error.txt").write_text(traceback.format_exc())
      line = f"{error} (where: {workdir / 'error.txt'})"
    elif peers.count == 1:
      raise
    else:
      traceback.print_exc()
    if peers.count == 1:
      logging.error("%s", line)
      sys.exit(1)
    peers.leave(line, status=1)
  peers.close()


if __name__ == "__main__":
  run_app(main)
