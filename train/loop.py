"""`fit`: the whole of training, top to bottom. Start reading here.

Each step is dispatched before the one before it is read, so the host never makes the device wait.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from absl import logging

from data import pipeline
from data.rows import Batch
from models.flops import count_params, flops_per_token
from sharding import topology
from sharding.mesh import row_share
from train import program as programs
from train.bad_steps import BadSteps, RollBack
from train.checkpoint.checkpoints import Checkpoints, Kind
from train.config import Run, flatten
from train.evaluate import evaluate
from train.initial import initial_state
from train.job import agreement
from train.job.peers import Peers
from train.job.watchdog import Watchdog
from train.layer_statistics import by_layer, declared
from train.program import Program
from train.record import compare_records, run_record
from train.state import TrainState
from train.step import StepMetrics
from train.telemetry import events as event_log
from train.telemetry.events import Events
from train.telemetry.loss_curve import plot_losses
from train.telemetry.metrics import JSONL, Metrics
from train.telemetry.throughput import Throughput, mfu
from train.workdir.whole_file import write_whole

Outcome = Literal["complete", "stopped"]

_PICTURE = "loss.png"


def fit(
  run: Run,
  workdir: pathlib.Path,
  peers: Peers | None = None,
  *,
  saves_to: str | None = None,
  before_complete: Callable[[], object] = lambda: None,
  began: float | None = None,
) -> Outcome:
  """Trains `run` in `workdir` with all processes of `peers` (None: this one), from its newest
  checkpoint if there is one. Checkpoints are in the folder or URL `saves_to` (WORKDIR/checkpoints).

  Returns "complete" after the last step; "stopped" when a process was asked to stop and everything
  is saved. `before_complete` is called on process 0 before a checkpoint counts as complete, in the
  thread that writes it. The event log starts at `began`, seconds since 1970 (None: this call).
  Raises BadStepError, and ValueError for what a user can correct.
  """
  began = event_log.now() if began is None else began
  peers = peers or Peers.alone()
  run = within_the_data(run)
  program = programs.build(run)
  record = run_record(run, program.model)
  agreement.check(peers, record)
  count = count_params(run.model)
  logging.info("%s: %s parameters, of them %s embedding", run.name, *_thousands(count))
  logging.info("mesh %s, ZeRO stage %d", dict(program.mesh.shape), run.zero_stage)

  def check(saved: dict[str, Any]) -> None:
    for change in compare_records(saved, record):
      logging.info("changed since the checkpoint: %s", change)

  with (
    Watchdog(workdir, run.watchdog, peers) as watchdog,
    Checkpoints(
      saves_to or workdir / "checkpoints", run.checkpoint, before_complete=before_complete
    ) as checkpoints,
    Events(workdir, began=began, about=_about(program)) as events,
  ):
    bad_steps = BadSteps(run.bad_steps, workdir, data=run.data, batch_size=run.batch_size)
    session: _Session | None = None
    outcome: Outcome | None = None
    # More than once only if a bad step sends the run back to its last checkpoint.
    while outcome is None:
      watchdog.begins("restoring")
      with events.span("restore"):
        restored = checkpoints.restore(program.abstract, check=check)
      if restored is None:
        state, step = initial_state(program), 0
        bad_steps.begin(step, None)
      else:
        state, step = restored.state, restored.step
        bad_steps.begin(step, restored.record)
        logging.info("restored step %d from %s", step, checkpoints.storage)
      del restored
      if jax.process_index() == 0:
        # Not earlier: the check of the restored record may have refused this run.
        settings = json.dumps(flatten(run), indent=1, default=repr)
        write_whole(workdir / "config.json", settings + "\n")
      if step >= (last := _last_step(run, bad_steps)):
        logging.info("the run is complete: step %d of %d", step, last)
        events.end("complete")
        _draw(workdir, run.name)  # it may have been killed after its last checkpoint
        return "complete"
      events.resume(step)
      metrics = Metrics(
        workdir,
        run.metrics,
        name=run.name,
        settings=record["identity"],
        start_step=step,
        total_steps=last,
      )
      watchdog.begins("compiling")
      with metrics:
        session = session or _Session(program, checkpoints, events, watchdog, bad_steps, record)
        try:
          outcome = session.train(state, step, last, metrics, peers)
        except RollBack as back:
          bad_steps.pass_over(back, checkpoint=checkpoints.latest() or 0)
    events.end(outcome)
  _draw(workdir, run.name)
  ended = "stopped, the same command goes on" if outcome == "stopped" else outcome
  logging.info("%s; metrics: %s, picture: %s", ended, workdir / JSONL, workdir / _PICTURE)
  return outcome


class _Running(NamedTuple):
  """A step that the device may still be working on."""

  step: int
  metrics: StepMetrics
  statistics: dict[str, Any] | None  # None for steps where they are not due


def _is_over(running: _Running) -> bool:
  return all(x.is_ready() for x in jax.tree.leaves((running.metrics, running.statistics)))


class _Session:
  """One start of a run: from its first step to its last, or to the signal that ends it."""

  def __init__(
    self,
    program: Program,
    checkpoints: Checkpoints,
    events: Events,
    watchdog: Watchdog,
    bad_steps: BadSteps,
    record: dict[str, Any],
  ):
    self.run, self.program, self.record = program.run, program, record
    self.checkpoints, self.events = checkpoints, events
    self.watchdog, self.bad_steps = watchdog, bad_steps
    start = time.monotonic()
    with events.span("compile"):
      self.train_step = programs.compile_step(program, programs.lower_train_step(program))
      evaluates = self.run.data.eval_source is not None
      lowered = programs.lower_eval_step(program) if evaluates else None
      self.eval_step = None if lowered is None else programs.compile_step(program, lowered)
    logging.info("compiled in %.1f s", time.monotonic() - start)
    every = self.run.statistics.every
    self.statistics_step = programs.compile_statistics_aside(program) if every else None
    self.flops = flops_per_token(self.run.model, self.run.data.row_length).train
    chip = topology.chip_of(jax.devices()[0].device_kind)
    self.peak_flops = None if chip is None else chip.peak_flops * program.mesh.size

  def train(
    self, state: TrainState, step: int, last: int, metrics: Metrics, peers: Peers
  ) -> Outcome:
    """Runs steps `step` + 1 to `last`; when it returns, BadSteps has judged all of them."""
    run, self.metrics = self.run, metrics
    self.throughput = Throughput(
      tokens_per_step=run.batch_size * run.data.row_length,
      start_step=step,
      total_steps=last,
    )
    running: _Running | None = None
    saved = step
    with self._train_batches(step) as batches, self.events.span("step"):
      while step < last and not peers.reached(step):
        if running is not None and peers.count == 1 and _is_over(running):
          # On a CPU a step runs while it is dispatched: without this its time would include the
          # next one. With several processes, not all would see that it is over.
          self._finish(running)
          running = None
        with self.throughput.waiting(), self.events.waiting():
          batch = programs.to_devices(next(batches), self.program.mesh)
        step += 1
        state, reported = self.train_step(state, batch, self.bad_steps.limits(step))
        if running is not None:
          self._finish(running)
        running = _Running(step, reported, self._statistics(step, state, batch, reported))

        is_last = step == last
        kind = self.checkpoints.due(step) or ("permanent" if is_last else None)
        evaluates = self.eval_step is not None and (is_last or step % run.eval_every == 0)
        if kind or evaluates:
          # Judge the step first: a bad one is never saved. Evaluate before saving: a restart from
          # this checkpoint then does not evaluate again.
          self._finish(running)
          running = None
          with self.throughput.excluded(after=state):
            if evaluates:
              self._evaluate(step, state)
            if kind:
              self._save(step, state, kind)
              saved = step
      if running is not None:
        self._finish(running)
      if saved < step:
        # A signal ended the loop at a step that was not due.
        self._save(step, state, "temporary")
    with self.events.span("checkpoint"):
      self.checkpoints.wait()
    return "complete" if step == last else "stopped"

  def _finish(self, running: _Running) -> None:
    """Waits for a step on the device and reads its metrics; writes them if they are due."""
    step, metrics, statistics = running
    jax.block_until_ready(metrics.loss)
    self.watchdog.step(step)
    self.bad_steps.judge(step, metrics)
    self.throughput.count_step()
    self.events.finished(step)
    if statistics is not None and bool(metrics.is_applied):
      columns = by_layer(self.run.model, jax.device_get(statistics))
      self.metrics.write_layers(step, columns, about=declared(self.run.model))
    if not self.metrics.due(step):
      return
    rates = self.throughput.read()
    values = {
      "train/loss": float(metrics.loss),
      "train/z_loss": float(metrics.z_loss),
      "train/targets": float(metrics.weight),
      "train/grad_norm": float(metrics.grad_norm),
      "train/learning_rate": float(
        self.run.optimizer.learning_rate(step, total_steps=self.run.total_steps)
      ),
      "train/tokens_per_second": rates.tokens_per_second,
      "train/step_seconds": rates.step_seconds,
      "train/data_wait": rates.data_wait,
      "train/goodput": self.events.goodput(),
      "train/seconds_left": rates.seconds_left,
    }
    if self.peak_flops is not None:
      values["train/mfu"] = mfu(
        flops_per_token=self.flops,
        tokens_per_second=rates.tokens_per_second,
        peak_flops=self.peak_flops,
      )
    if self.bad_steps.skipped:
      values["train/skipped_steps"] = self.bad_steps.skipped
    if self.bad_steps.passed_over:
      values["train/passed_over"] = len(self.bad_steps.passed_over)
    self.metrics.write(step, values)

  def _statistics(
    self, step: int, state: TrainState, batch: Batch, metrics: StepMetrics
  ) -> dict[str, Any] | None:
    if self.statistics_step is None or not self.run.statistics.due(step):
      return None
    return self.statistics_step.result()(state, batch, metrics.square_norms, metrics.weight)

  def _evaluate(self, step: int, state: TrainState) -> None:
    assert self.eval_step is not None
    start = time.monotonic()
    data = self.run.data
    batches = pipeline.eval_batches(data, batch_size=self.run.batch_size, **self._share())
    with batches, self.events.span("evaluation", step=step):
      result = evaluate(
        self.eval_step,
        state.params,
        (programs.to_devices(batch, self.program.mesh) for batch in batches),
        bytes_per_target=pipeline.bytes_per_target(data),
      )
    values = {
      "eval/loss": result.loss,
      "eval/bits_per_byte": result.bits_per_byte,
      "eval/seconds": time.monotonic() - start,
    }
    self.metrics.write(step, values)

  def _save(self, step: int, state: TrainState, kind: Kind) -> None:
    record = {**self.record, **self.bad_steps.record(step)}
    with self.events.span("checkpoint"):
      self.checkpoints.save(step, state, record, kind=kind)

  def _train_batches(self, step: int) -> pipeline.Batches:
    return pipeline.train_batches(
      self.run.data,
      batch_size=self.run.batch_size,
      start_step=step,
      passed_over=self.bad_steps.passed_over,
      **self._share(),
    )

  def _share(self) -> dict[str, int]:
    """Which rows of a batch this process reads; its devices' places in the mesh decide."""
    share = row_share(self.program.mesh.devices, jax.process_index())
    return {"process_index": share.index, "process_count": share.count}


def within_the_data(run: Run) -> Run:
  """The run, shortened to the end of its data, after checking that the model fits the data."""
  vocabulary = pipeline.vocabulary(run.data)
  if vocabulary.size > run.model.vocab_size:
    raise ValueError(
      f"the token stores use a vocabulary of {vocabulary.size} ids ({vocabulary.kind}), the model "
      f"has {run.model.vocab_size}; set model.vocab_size to at least {vocabulary.size}, or prepare "
      "the text with the model's vocabulary"
    )
  available = pipeline.num_steps_available(run.data, batch_size=run.batch_size)
  if available is None or available >= run.total_steps:
    return run
  logging.info("the data ends after %d steps, total_steps was %d", available, run.total_steps)
  return dataclasses.replace(run, total_steps=available)


def _draw(workdir: pathlib.Path, name: str) -> None:
  if jax.process_index() == 0:
    plot_losses(workdir / JSONL, workdir / _PICTURE, name=name)


def _about(program: Program) -> dict[str, Any]:
  """What the report needs to know about a run besides its metrics."""
  run = program.run
  return {
    "name": run.name,
    "total_steps": run.total_steps,
    "tokens_per_step": run.batch_size * run.data.row_length,
    "row_length": run.data.row_length,
    "flops_per_token": flops_per_token(run.model, run.data.row_length).train,
    "devices": f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}",
  }


def _last_step(run: Run, bad_steps: BadSteps) -> int:
  """The last step; where the data ends, batches that are passed over make the run shorter."""
  available = pipeline.num_steps_available(
    run.data, batch_size=run.batch_size, passed_over=bad_steps.passed_over
  )
  return run.total_steps if available is None else min(run.total_steps, available)


def _thousands(count: Any) -> tuple[str, str]:
  return f"{count.total:,}", f"{count.embedding:,}"
