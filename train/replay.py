"""Runs one step again to look at it: its loss by row, the text of the rows, its gradient by tensor.

It starts from the newest checkpoint before the step and reads the batches that the run read. It
takes no lock and writes nothing, so a run may be training in the same workdir.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from data import pipeline
from data.mixture import RowAddress
from data.pipeline import RowContent, position
from data.vocabulary import Vocabulary
from sharding.mesh import row_share
from train import program as programs
from train.bad_steps import BadSteps, named_norms
from train.checkpoint.reading import read_run_record, restore
from train.checkpoint.storage import steps
from train.config import Run
from train.job.broadcast import broadcast
from train.loop import within_the_data
from train.record import compare_records, run_record
from train.step import Limits
from train.telemetry.metrics import JSONL
from train.workdir.jsonl import read_jsonl

_TEXT_BYTES = 60


class ReplayedRow(NamedTuple):
  """A row of the batch, and its mean loss in nats per target; NaN also where it has no target."""

  address: RowAddress
  content: RowContent
  loss: float


class Replayed(NamedTuple):
  """A step as it was: `loss` and `grad_norm` of the whole batch, `gradients` the norms of each
  tensor and layer, those that are not finite first, then the largest."""

  step: int
  batch: int
  start: int  # the step of the checkpoint it was run from; 0 is the beginning
  loss: float
  grad_norm: float
  limits: Limits
  is_applied: bool
  rows: list[ReplayedRow]
  gradients: list[tuple[str, float]]
  told: float | None  # the loss that the run itself reported, in a record or in metrics.jsonl
  record: pathlib.Path | None  # of the bad step, if it was one


def replay(run: Run, workdir: pathlib.Path, step: int, *, saves_to: str | None = None) -> Replayed:
  """Step `step` (from 1) of the run in `workdir`; `saves_to` is as for train/loop.py: fit.

  If bad_steps/ has a record of that step, the step is repeated with the batch of the record, which
  was passed over afterwards; the last record if there are several. ValueError for a step that the
  run cannot have, and for a config that is not the run's.
  """
  run = within_the_data(run)
  if not 1 <= step <= run.total_steps:
    raise ValueError(f"--replay_step {step} is not a step of the run: 1 .. {run.total_steps}")
  program = programs.build(run)
  found = _found(workdir, step)
  directory = saves_to or str(workdir / "checkpoints")
  bad_steps = BadSteps(run.bad_steps, workdir, data=run.data, batch_size=run.batch_size)
  state, start = _before(program, directory, bad_steps, step, found.passed_over)
  train_step = programs.compile_step(program, programs.lower_train_step(program))
  row_losses = programs.compile_step(program, programs.lower_row_losses(program))
  logging.info("running from step %d to step %d", start, step)
  share = row_share(program.mesh.devices, jax.process_index())
  with pipeline.train_batches(
    run.data,
    batch_size=run.batch_size,
    start_step=start,
    passed_over=bad_steps.passed_over,
    process_index=share.index,
    process_count=share.count,
  ) as batches:
    for before in range(start + 1, step):
      batch = programs.to_devices(next(batches), program.mesh)
      state, metrics = train_step(state, batch, bad_steps.limits(before))
      bad_steps.remember(before, metrics)
    batch = programs.to_devices(next(batches), program.mesh)
  losses_B = np.asarray(row_losses(state.params, batch))
  limits = bad_steps.limits(step)
  _, metrics = train_step(state, batch, limits)
  addresses = bad_steps.rows(step)
  contents = pipeline.row_contents(run.data, addresses)
  return Replayed(
    step=step,
    batch=bad_steps.position(step),
    start=start,
    loss=float(metrics.loss),
    grad_norm=float(metrics.grad_norm),
    limits=limits,
    is_applied=bool(metrics.is_applied),
    rows=[ReplayedRow(*row) for row in zip(addresses, contents, losses_B.tolist(), strict=True)],
    gradients=_by_badness(metrics.square_norms, float(metrics.weight)),
    told=found.told,
    record=found.record,
  )


def lines(replayed: Replayed, run: Run, words: Vocabulary | None, *, limit: int = 12) -> list[str]:
  """The result as lines for people: the worst rows and tensors first, `limit` of each.

  `words` decodes the rows; without it they are shown as token ids.
  """
  it = replayed
  start = f"the checkpoint of step {it.start}" if it.start else "the beginning"
  text = [
    f"step {it.step}, batch {it.batch}, run again from {start}",
    f"  loss       {it.loss:.6g}{_compared(it)}",
    f"  grad norm  {it.grad_norm:.6g}",
  ]
  if np.isfinite(it.limits.loss):
    text.append(f"  limits     loss {it.limits.loss:.6g}, grad norm {it.limits.grad_norm:.6g}")
  if not it.is_applied:
    text.append("  the step changed nothing: its loss or gradient is not finite, or above a limit")
  if it.record is not None:
    text.append(f"  as recorded in {it.record}")
  shown = sorted(it.rows, key=lambda row: _badness(row.loss), reverse=True)[:limit]
  text.append(f"rows, the worst {len(shown)} of {len(it.rows)}")
  text.append("  loss        source  row         documents          text")
  for row in shown:
    documents = f"{row.content.documents.start}..{row.content.documents.stop - 1}"
    text.append(
      f"  {row.loss:<10.5g}  {row.address.source:<6}  {row.address.row:<10}  {documents:<17}  "
      f"{_shown(row.content.tokens, words)}"
    )
  text += [f"  source {k} is {path}" for k, (path, _) in enumerate(run.data.sources)]
  tensors = it.gradients[:limit]
  text.append(f"gradient norms, the worst {len(tensors)} of {len(it.gradients)} tensors and layers")
  text += [f"  {norm:<10.5g}  {name}" for name, norm in tensors]
  return text


class _Found(NamedTuple):
  """What the run has recorded of the step: its loss; for a bad step also its last record, and the
  batches that were passed over by then."""

  told: float | None
  record: pathlib.Path | None
  passed_over: list[int] | None


def _found(workdir: pathlib.Path, step: int) -> _Found:
  """`_found` on process 0, sent to all: other machines may not have the workdir's files."""
  text = _read_first(workdir, step) if jax.process_index() == 0 else ""
  told, record, passed_over = json.loads(broadcast(text))
  return _Found(
    told=None if told is None else float(told),
    record=None if record is None else pathlib.Path(record),
    passed_over=passed_over,
  )


def _read_first(workdir: pathlib.Path, step: int) -> str:
  records = sorted((workdir / "bad_steps").glob(f"{step:08d}-*.json"))
  if records:
    record = json.loads(records[-1].read_text())
    return json.dumps([record["loss"], str(records[-1]), record["passed_over"]])
  told = [
    record["train/loss"]
    for record in read_jsonl(workdir / JSONL)
    if record.get("step") == step and "train/loss" in record
  ]
  return json.dumps([told[-1] if told else None, None, None])


def _before(
  program: programs.Program,
  directory: str,
  bad_steps: BadSteps,
  step: int,
  wanted: list[int] | None,
) -> tuple[Any, int]:
  """State and step of the newest checkpoint before `step` that led to it; begins `bad_steps`.

  `wanted` are the batches that were passed over at that time; None: today's.
  """
  now = run_record(program.run, program.model)

  def check(saved: dict[str, Any]) -> None:
    for change in compare_records(saved, now):
      logging.info("changed since the checkpoint: %s", change)

  for found in reversed([other for other in steps(directory) if other < step]):
    saved = read_run_record(directory, found)
    check(saved)
    if wanted is not None and not _same_so_far(found, saved["bad_steps"]["passed_over"], wanted):
      continue
    restored = restore(directory, found, program.abstract, check=lambda _: None)
    bad_steps.begin(found, saved, passed_over=wanted)
    return restored.state, found
  logging.info("%s has no checkpoint before step %d: running from the beginning", directory, step)
  bad_steps.begin(0, None, passed_over=wanted)
  return programs.initialize(program), 0


def _same_so_far(step: int, one: Sequence[int], other: Sequence[int]) -> bool:
  """Whether the first `step` steps read the same batches, whichever of the lists is passed over."""
  ends = [position(step - 1, passed) if step else -1 for passed in (one, other)]
  missing = [{batch for batch in passed if batch < ends[0]} for passed in (one, other)]
  return ends[0] == ends[1] and missing[0] == missing[1]


def _by_badness(square_norms: Any, weight: float) -> list[tuple[str, float]]:
  norms = [
    (name, math.sqrt(square) / max(weight, 1.0) if square >= 0 else math.nan)
    for name, square in named_norms(square_norms)
  ]
  return sorted(norms, key=lambda named: _badness(named[1]), reverse=True)


def _badness(value: float) -> float:
  return value if math.isfinite(value) else math.inf


def _compared(it: Replayed) -> str:
  if it.told is None:
    return ""
  same = it.told == it.loss or (math.isnan(it.told) and math.isnan(it.loss))
  return ", bit for bit what the run told" if same else f", the run told {it.told:.6g}"


def _shown(tokens: np.ndarray, words: Vocabulary | None) -> str:
  if words is None:
    return " ".join(map(str, tokens[:16].tolist())) + " ..."
  return repr(words.decode(tokens)[:_TEXT_BYTES])
