"""Steps that must not count (not finite, or a spike): what is done about them, and their records.

WORKDIR/bad_steps/<step>-<batch>.json   what happened, and the rows: `--replay_step` reads it
WORKDIR/passed_over.json                the batches that this run never reads again, and why

Every decision is a function of the config and of the steps so far. All processes see the same
steps, and checkpoints keep them, so a restart, or another number of hosts, decides the same.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
from absl import logging

from data import pipeline
from data.mixture import RowAddress
from data.pipeline import DataConfig, position
from train.job.broadcast import broadcast
from train.step import NO_LIMITS, Limits, StepMetrics
from train.workdir.whole_file import write_whole

Action = Literal["stop", "skip", "rollback"]

PASSED_OVER = "passed_over.json"
_ACTIONS = ("stop", "skip", "rollback")
# The standard deviation of normal noise, in median absolute deviations.
_NORMAL = 1.4826
# Where the last losses are nearly equal, a tiny difference is not a spike.
_LEAST_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadStepPolicy:
  """What happens at a step that is not finite, and at a spike: neither ever changes a parameter.

  non_finite, spike: "stop" ends the run there; "skip" goes on, up to `max_skipped` bad steps in a
  row; "rollback" goes back to the last checkpoint and from then on passes over the batch of the
  step, and those of the `also_before` steps before it that are not in the checkpoint, up to
  `max_rollbacks` times to one checkpoint. spike "ignore": no step is a spike.

  A spike is a loss or a gradient norm above m + `spike_deviations` * d, where m is the median of
  the last `spike_window` good steps and d their median absolute deviation, scaled to a standard
  deviation of normal noise. The step right before is read too late to be among them. No step is a
  spike before there are `spike_window` good steps.
  """

  recorded_as: ClassVar[str] = "train.bad_steps.BadStepPolicy"

  non_finite: Action = "stop"
  spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
  spike_window: int = 128
  spike_deviations: float = 10.0
  max_skipped: int = 10
  max_rollbacks: int = 3
  also_before: int = 0

  def __post_init__(self):
    if self.non_finite not in _ACTIONS:
      raise ValueError(f"BadStepPolicy: non_finite {self.non_finite!r} is none of {_ACTIONS}")
    if self.spike not in ("ignore", *_ACTIONS):
      raise ValueError(f"BadStepPolicy: spike {self.spike!r} is none of {('ignore', *_ACTIONS)}")
    for name, least in (("max_skipped", 1), ("max_rollbacks", 1), ("also_before", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"BadStepPolicy: {name} {getattr(self, name)} must be at least {least}")
    if self.spike_window < 4:
      raise ValueError(
        f"BadStepPolicy: spike_window {self.spike_window} must be at least 4: fewer steps have no "
        "spread; spike=ignore looks for no spikes"
      )
    if not self.spike_deviations > 0:
      raise ValueError(
        f"BadStepPolicy: spike_deviations {self.spike_deviations} must be above 0; spike=ignore "
        "looks for no spikes"
      )


class BadStepError(RuntimeError):
  """The run stopped at a step that is not finite, or a spike; the message says where and why."""


class RollBack(Exception):
  """The run goes back to its last checkpoint and passes over the batches that led to `step`."""

  def __init__(self, step: int, why: str):
    super().__init__(why)
    self.step, self.why = step, why


class _Good(NamedTuple):
  """A good step, against which later ones are judged."""

  step: int
  loss: float
  grad_norm: float


class BadSteps:
  """The bad steps of one run so far; every process has one, and they agree.

  Call `begin` where training starts, then `limits` before each step and `judge` after it.
  """

  def __init__(
    self, policy: BadStepPolicy, workdir: pathlib.Path, *, data: DataConfig, batch_size: int
  ):
    self.policy, self.workdir = policy, workdir
    self._data, self._batch_size = data, batch_size
    self.passed_over: tuple[int, ...] = ()
    self.skipped = self._skipped_in_a_row = 0
    self._good: list[_Good] = []

  def begin(
    self, step: int, record: dict[str, Any] | None, *, passed_over: Sequence[int] | None = None
  ) -> None:
    """Continues after `step`, from the record in its checkpoint (None: a new start).

    `passed_over` is for looking back: these batches instead of today's. ValueError if
    passed_over.json does not fit the checkpoint.
    """
    saved = {"passed_over": [], "skipped": 0, "skipped_in_a_row": 0, "good": []}
    saved = saved if record is None else record["bad_steps"]
    self.skipped, self._skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
    self._good = [_Good(*values) for values in saved["good"]]
    if passed_over is not None:
      self.passed_over = tuple(passed_over)
      return
    later = [batch for rollback in self._rollbacks() for batch in rollback["batches"]]
    self.passed_over = tuple(sorted({*saved["passed_over"], *later}))
    newest = position(step - 1, saved["passed_over"]) if step else -1
    seen = sorted(b for b in set(later) - set(saved["passed_over"]) if b <= newest)
    if seen:
      raise ValueError(
        f"{self.workdir / PASSED_OVER} passes over batches {seen}, which the checkpoint of "
        f"step {step} has seen: it is not of this run. Move the file away, or go on from an "
        "earlier checkpoint by moving the later ones away"
      )
    if self.passed_over:
      logging.info("passing over batches %s (%s)", list(self.passed_over), PASSED_OVER)

  def record(self, step: int) -> dict[str, Any]:
    """What the run's record in the checkpoint of `step` has to contain."""
    return {
      "position": position(step, self.passed_over),
      "bad_steps": {
        "passed_over": list(self.passed_over),
        "skipped": self.skipped,
        "skipped_in_a_row": self._skipped_in_a_row,
        "good": [list(good) for good in self._good],
      },
    }

  def position(self, step: int) -> int:
    """Which batch step `step` (from 1) reads."""
    return position(step - 1, self.passed_over)

  def rows(self, step: int) -> list[RowAddress]:
    """The rows of step `step` (from 1), over all processes."""
    return pipeline.batch_addresses(
      self._data, position=self.position(step), batch_size=self._batch_size
    )

  def limits(self, step: int) -> Limits:
    """The limits of loss and gradient norm for `step`, from the good steps up to `step` - 2."""
    # The step before is still running when this one is dispatched. It must not count either where a
    # checkpoint or an evaluation has waited for it: a restart would decide differently.
    known = [good for good in self._good if good.step <= step - 2][-self.policy.spike_window :]
    if self.policy.spike == "ignore" or len(known) < self.policy.spike_window:
      return NO_LIMITS
    values = np.array([(good.loss, good.grad_norm) for good in known], np.float64)
    median = np.median(values, axis=0)
    deviation = _NORMAL * np.median(np.abs(values - median), axis=0)
    deviation = np.maximum(deviation, _LEAST_DEVIATION * np.abs(median))
    loss, grad_norm = (median + self.policy.spike_deviations * deviation).tolist()
    return Limits(np.float32(loss), np.float32(grad_norm))

  def judge(self, step: int, metrics: StepMetrics) -> None:
    """Remembers a finished step. A bad one is recorded, and skipped, or raises BadStepError or
    RollBack, as the policy says."""
    if self.remember(step, metrics):
      return
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    limits = self.limits(step)
    rows = self.rows(step)
    is_spike = bool(np.isfinite(loss) and np.isfinite(grad_norm))
    action = self.policy.spike if is_spike else self.policy.non_finite
    why = (
      f"step {step}: loss {loss:.6g} or gradient norm {grad_norm:.6g} is a spike: the last "
      f"{self.policy.spike_window} good steps allow {limits.loss:.6g} and {limits.grad_norm:.6g}"
      if is_spike
      else f"step {step}: loss {loss} and gradient norm {grad_norm} are not finite"
    )
    tensors = [] if is_spike else bad_tensors(metrics.square_norms)
    numbers = {"loss": loss, "grad_norm": grad_norm}
    numbers |= {"loss_limit": float(limits.loss), "grad_norm_limit": float(limits.grad_norm)}
    # JSON has no NaN: as strings, which float() reads.
    numbers = {name: repr(value) for name, value in numbers.items()}
    path = self._write(step, why=why, action=action, **numbers, rows=rows, tensors=tensors)
    where = f". Not finite: {', '.join(tensors) or 'no gradient, only the loss'}"
    line = f"{why}. Rows: {_shown(rows)}{'' if is_spike else where}. Written to {path}"
    if action == "rollback":
      raise RollBack(step, line)
    self.skipped += 1
    self._skipped_in_a_row += 1
    if action == "stop" or self._skipped_in_a_row > self.policy.max_skipped:
      raise BadStepError(f"{line}. {self._advice(step, is_spike)}")
    logging.warning("%s. Skipped: parameters and moments are as before", line)

  def remember(self, step: int, metrics: StepMetrics) -> bool:
    """Whether a finished step was good; if so, later steps are judged by it."""
    if not bool(metrics.is_applied):
      return False
    self._skipped_in_a_row = 0
    if self.policy.spike != "ignore":
      good = _Good(step, float(metrics.loss), float(metrics.grad_norm))
      # One more than the window, because the newest may be too new to count.
      self._good = [*self._good, good][-self.policy.spike_window - 1 :]
    return True

  def pass_over(self, rollback: RollBack, *, checkpoint: int) -> None:
    """Records on disk that the run goes back to the checkpoint of a step (0: to its beginning), and
    which batches it passes over from then on. BadStepError after too many rollbacks to it."""
    rollbacks = self._rollbacks()
    before = [other for other in rollbacks if other["checkpoint"] == checkpoint]
    if len(before) >= self.policy.max_rollbacks:
      raise BadStepError(
        f"{rollback.why}. The run went back to the checkpoint of step {checkpoint} "
        f"{len(before)} times, bad_steps.max_rollbacks is {self.policy.max_rollbacks}: lower "
        "optimizer.peak_lr, pass over more with bad_steps.also_before, or go on from an earlier "
        "checkpoint by moving the later ones away"
      )
    first = max(checkpoint + 1, rollback.step - self.policy.also_before)
    batches = [self.position(step) for step in range(first, rollback.step + 1)]
    note = {"step": rollback.step, "checkpoint": checkpoint, "batches": batches}
    note |= {"time": round(time.time(), 3), "why": rollback.why}
    if jax.process_index() == 0:
      content = json.dumps({"rollbacks": [*rollbacks, note]}, indent=1) + "\n"
      write_whole(self.workdir / PASSED_OVER, content)
    where = f"checkpoint of step {checkpoint}" if checkpoint else "beginning"
    logging.warning(
      "%s. Going back to the %s and passing over batches %s from now on",
      rollback.why,
      where,
      batches,
    )

  def _rollbacks(self) -> list[dict[str, Any]]:
    """What process 0 has recorded: with a workdir in a bucket, only its machine has the file."""
    path = self.workdir / PASSED_OVER
    text = path.read_text() if jax.process_index() == 0 and path.exists() else ""
    if not (text := broadcast(text)):
      return []
    try:
      rollbacks = json.loads(text)["rollbacks"]
      [(int(note["checkpoint"]), *map(int, note["batches"])) for note in rollbacks]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path} cannot be read ({error!r}): mend it, or move it away to read its batches again"
      ) from error
    return rollbacks

  def _write(self, step: int, **content: Any) -> pathlib.Path:
    """The record of a bad step, from process 0: enough to repeat it."""
    batch = self.position(step)
    path = self.workdir / "bad_steps" / f"{step:08d}-{batch:08d}.json"
    if jax.process_index() == 0:
      content["rows"] = [row._asdict() for row in content["rows"]]
      record = {"step": step, "batch": batch, "passed_over": list(self.passed_over), **content}
      path.parent.mkdir(parents=True, exist_ok=True)
      write_whole(path, json.dumps(record) + "\n")
    return path

  def _advice(self, step: int, is_spike: bool) -> str:
    kind = "spike" if is_spike else "non_finite"
    look = f"Look at it with --replay_step={step}"
    if (self.policy.spike if is_spike else self.policy.non_finite) == "stop":
      return (
        f"{look}. The last checkpoint is from before it. bad_steps.{kind}=skip goes on without "
        f"such steps, bad_steps.{kind}=rollback passes over the rows; else lower optimizer.peak_lr"
      )
    return (
      f"{look}. {self._skipped_in_a_row} bad steps in a row are more than bad_steps.max_skipped "
      f"{self.policy.max_skipped}: lower optimizer.peak_lr, or go on from an earlier checkpoint by "
      "moving the later ones away"
    )


def bad_tensors(square_norms: Any, *, limit: int = 8) -> list[str]:
  """The first parameters and layers with a gradient that is not finite, named as in named_norms."""
  bad = [name for name, square in named_norms(square_norms) if not np.isfinite(square)]
  return bad[:limit]


def named_norms(square_norms: Any) -> list[tuple[str, float]]:
  """Path -> square norm of each parameter; for stacked layers with the number in brackets."""
  named = []
  for path, squares in jax.tree_util.tree_leaves_with_path(square_norms):
    name = "/".join(str(key.key) for key in path)
    for index, square in np.ndenumerate(np.asarray(squares)):
      named.append((name + "".join(f"[{i}]" for i in index), float(square)))
  return named


def _shown(rows: Sequence[RowAddress]) -> str:
  shown = ", ".join(f"{row.row} of source {row.source}" for row in rows[:8])
  return shown + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
