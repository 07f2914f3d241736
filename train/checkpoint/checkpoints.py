"""Checkpoints: the state, the data position and the run record, complete or absent.

Whenever the process is killed, the last complete checkpoint stays: no older one is removed before a
newer one is complete. folder.py and bucket.py (for a URL) say what is written where.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
from absl import logging

from train.checkpoint.checksums import checksums, named_leaves
from train.checkpoint.content import (
  FORMAT,
  DamagedCheckpointError,
  UnreadableError,
  describe,
  sealed,
)
from train.checkpoint.reading import Check, Restored, first_line, no_check, restore_from
from train.checkpoint.storage import Storage, read_content, storage_at
from train.job.broadcast import broadcast

Kind = Literal["permanent", "temporary"]

# With several processes, asking process 0 for the time is a collective: not in every step.
_STEPS_BETWEEN_CLOCKS = 16
_SAVE_TIMEOUT_SECONDS = 1200


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When checkpoints are written and which are kept, by the clock of process 0.

  every_steps: a permanent one at each multiple. keep_permanent: how many of the newest are kept,
  None for all. temporary_minutes: a temporary one after so many minutes without a save, None for
  never. keep_temporary: a temporary one is removed when this many newer ones (of either kind) are
  complete. on_damage: "refuse" a damaged newest checkpoint, or go on from the one before
  ("previous").
  verify: compare the checksum of every restored array.
  """

  recorded_as: ClassVar[str] = "train.checkpoint.CheckpointConfig"

  every_steps: int = 1000
  keep_permanent: int | None = None
  temporary_minutes: float | None = None
  keep_temporary: int = 1
  on_damage: Literal["refuse", "previous"] = "refuse"
  verify: bool = True

  def __post_init__(self):
    for name in ("every_steps", "keep_permanent", "keep_temporary"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"CheckpointConfig: {name} {value} must be at least 1")
    if self.temporary_minutes is not None and not self.temporary_minutes > 0:
      raise ValueError(
        f"CheckpointConfig: temporary_minutes {self.temporary_minutes} must be above 0; None is "
        "no temporary checkpoints"
      )
    if self.on_damage not in ("refuse", "previous"):
      raise ValueError(
        f"CheckpointConfig: on_damage {self.on_damage!r} is none of 'refuse', 'previous'"
      )


class SaveFailedError(RuntimeError):
  """A checkpoint could not be written: the run must not go on as if it had been."""


class Checkpoints:
  """The checkpoints of one run, for the processes that train it; use it in a `with`.

  Every method has to be called by all processes alike. A failed save raises SaveFailedError from
  the next call of any method. Process 0 calls `before_complete` in the thread that writes, when all
  arrays are written and before the checkpoint counts as complete.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    config: CheckpointConfig,
    *,
    before_complete: Callable[[], object] = lambda: None,
  ):
    self.storage = storage_at(directory)
    self.config = config
    self._is_first = jax.process_index() == 0
    self.storage.prepare()
    self._lock = self.storage.lock() if self._is_first else None
    self._writer = self.storage.writer(
      timeout_seconds=_SAVE_TIMEOUT_SECONDS, before_complete=before_complete
    )
    if self._is_first:
      self._writer.clean_up()
    self._kinds = _kinds(self.storage)
    self._pending: int | None = None
    self._ours: set[int] = set()  # steps whose checkpoint holds the state this run had there
    self._last_seconds = time.monotonic()

  def latest(self) -> int | None:
    """The newest step with a readable checkpoint, None where there is none; it first waits until
    nothing is being written.

    A newer folder without a readable record raises DamagedCheckpointError, or is set aside if
    on_damage is "previous".
    """
    self.wait()
    while (step := _of_first_process(max(self.storage.steps(), default=-1))) >= 0:
      try:
        read_content(self.storage, step)
        return step
      except DamagedCheckpointError as error:
        self._pass_over(step, error)
    return None

  def due(self, step: int) -> Kind | None:
    """What has to be saved after `step` finished steps; call it once after each step."""
    self._settle()
    if step % self.config.every_steps == 0:
      return "permanent"
    if self.config.temporary_minutes is not None:
      if jax.process_count() > 1 and step % _STEPS_BETWEEN_CLOCKS:
        return None
      seconds = time.monotonic() - self._last_seconds
      if _of_first_process(int(seconds >= 60 * self.config.temporary_minutes)):
        return "temporary"
    return None

  def save(self, step: int, state: Any, record: dict[str, Any], *, kind: Kind) -> None:
    """Starts writing; returns when the arrays may be overwritten. JSON must hold `record`.

    A step that this run has saved already, or was restored from, is not written twice.
    """
    with self._failing(self._pending):
      if self._pending is not None and not self.storage.exists(self._pending):
        logging.warning(
          "step %d: waiting for the checkpoint of step %d; save less often", step, self._pending
        )
      self._writer.wait_until_finished()
    self._settle()
    if step in self._ours:
      logging.info("the checkpoint of step %d is there already", step)
      return
    if self._lock is not None:
      self._lock.check()
    if self.storage.exists(step):
      raise ValueError(
        f"{self.storage.at(step)} exists and is not of this run, which started before it; move it "
        "away, or use another workdir"
      )
    named = named_leaves(state)
    content = sealed(
      {
        **self._writer.location(step),
        "format": FORMAT,
        "step": step,
        "kind": kind,
        "arrays": describe(named, checksums(named)),
        "run": record,
      }
    )
    with self._failing(step):
      self._pending = step
      self._writer.save(step, named, content)
    self._kinds[step] = kind
    self._ours.add(step)
    self._last_seconds = time.monotonic()

  def restore(self, abstract: Any, *, check: Check = no_check) -> Restored | None:
    """The newest checkpoint, None where there is none; arguments as of reading.py: restore.

    Damage raises DamagedCheckpointError; with on_damage "previous" the damaged checkpoint is set
    aside and the one before is used.
    """
    while (step := self.latest()) is not None:
      try:
        restored = restore_from(
          self.storage, step, abstract, check=check, verify=self.config.verify
        )
        self._ours.add(step)
        return restored
      except DamagedCheckpointError as error:
        self._pass_over(step, error)
    return None

  def wait(self) -> None:
    """Returns when nothing is being written; raises SaveFailedError if that failed."""
    with self._failing(self._pending):
      self._writer.wait_until_finished()
    self._settle()

  def close(self) -> None:
    """Finishes writing and removing, and lets another run write here."""
    try:
      self.wait()
    finally:
      self._writer.close()
      if self._lock is not None:
        self._lock.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      self.close()
    except SaveFailedError as error:
      # The error that is on its way out matters more; this one must not hide it.
      if kind is None:
        raise
      if not issubclass(kind, SaveFailedError):  # else it is the same one, raised again
        logging.error("%s", error)

  def _last_complete(self) -> str:
    """The last complete checkpoint, for a message. It raises nothing: the storage may be what has
    failed."""
    try:
      complete = self.storage.steps()
    except (OSError, ValueError) as error:
      return f"not known ({error})"
    return f"that of step {max(complete)}" if complete else "none"

  def _settle(self) -> None:
    """Notices that a save has finished or failed; removes checkpoints that it makes superfluous."""
    with self._failing(self._pending):
      self._writer.check_for_errors()
    if self._pending is None or not self.storage.exists(self._pending):
      return
    complete, self._pending = self._pending, None
    logging.info("checkpoint of step %d is complete", complete)
    if self._is_first:
      with self._failing(complete):
        self._writer.make_durable()
      for step in superfluous(self._kinds, self.config):
        del self._kinds[step]
        self._writer.remove(step)

  def _pass_over(self, step: int, error: DamagedCheckpointError) -> None:
    """Sets a damaged checkpoint aside if that is asked for, else raises."""
    before = [other for other in self.storage.steps() if other < step]
    instead = f"that of step {max(before)}" if before else "a new start"
    if self.config.on_damage == "refuse":
      raise DamagedCheckpointError(
        f"{error}. To go on from {instead}: checkpoint.on_damage=previous, or move the folder away"
      ) from error
    if isinstance(error, UnreadableError) and jax.process_count() > 1:
      raise DamagedCheckpointError(
        f"{error}. Other processes may be able to read it, so it is not set aside: move the folder "
        f"away to go on from {instead}"
      ) from error
    aside = f"damaged-{step:08d}-{time.time_ns()}"
    _of_first_process(0)  # nobody is reading it any more
    if self._is_first:
      self._writer.set_aside(step, aside)
      logging.error("%s. It is now %s; going on from %s", error, aside, instead)
    _of_first_process(0)
    self._kinds.pop(step, None)
    self._ours.discard(step)

  @contextlib.contextmanager
  def _failing(self, step: int | None):
    """Turns whatever a save raises into SaveFailedError."""
    try:
      yield
    # Orbax and TensorStore raise all kinds, bare Exception too.
    except Exception as error:
      self._pending = None
      if step is not None:
        self._kinds.pop(step, None)
        self._ours.discard(step)
      last = self._last_complete()
      raise SaveFailedError(
        f"the checkpoint of step {step} could not be written to {self.storage}: "
        f"{first_line(error)}. The last complete one is {last}: free space, or mend what is "
        "named, and start the run again; it goes on from there"
      ) from error


def superfluous(kinds: dict[int, Kind], config: CheckpointConfig) -> list[int]:
  """Which of the complete checkpoints (step -> kind) the policy no longer keeps, ascending."""
  newest_first = sorted(kinds, reverse=True)
  permanent = [step for step in newest_first if kinds[step] == "permanent"]
  kept = set(newest_first[: config.keep_temporary]) | set(permanent[: config.keep_permanent])
  return sorted(step for step in kinds if step not in kept)


def _kinds(storage: Storage) -> dict[int, Kind]:
  """The kind of each readable checkpoint; unreadable ones are never removed."""
  kinds = {}
  for step in storage.steps():
    with contextlib.suppress(ValueError):
      kinds[step] = read_content(storage, step)["kind"]
  return kinds


def _of_first_process(value: int) -> int:
  """Process 0's value, on every process; all have arrived when it returns."""
  return int(broadcast(str(value)))
