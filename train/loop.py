"""`fit`: the whole of training, top to bottom. Start reading here.

Each step is dispatched before the one before it is read, so the host never makes the device wait.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal, NamedTuple

import jax
from absl import logging

from data import pipeline
from data.rows import Batch
from models.flops import count_params, flops_per_token
from sharding import topology
from sharding.mesh import row_share
from train import agreement, faults
from train import events as event_log
from train import program as programs
from train.checkpoint import Checkpoints, Kind
from train.config import Run
from train.evaluate import evaluate
from train.events import Events
from train.metrics import JSONL, Metrics
from train.peers import Peers
from train.plot import plot_losses
from train.program import Program
from train.record import compare_records, run_record
from train.state import TrainState
from train.statistics import by_layer
from train.step import StepMetrics
from train.throughput import Throughput, mfu
from train.watchdog import Watchdog

Outcome = Literal["complete", "stopped"]


def fit(
  run: Run,
  workdir: pathlib.Path,
  peers: Peers | None = None,
  *,
  saves_to: str | None = None,
  began: float | None = None,
) -> Outcome:
  """Trains `run` in `workdir` with all processes of `peers` (None: this one), from its newest
  checkpoint if there is one; they are in the folder or URL `saves_to`, else in WORKDIR/checkpoints.

  "complete" after the last step; "stopped" when a signal asked to leave and everything is saved.
  The event log counts from `began`, seconds since 1970; None is the moment of this call.
  Raises faults.NonFiniteError, and ValueError for what a user can set right.
  """
  began = event_log.now() if began is None else began
  peers = peers or Peers.alone()
  run = _within_the_data(run)
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
    Checkpoints(saves_to or workdir / "checkpoints", run.checkpoint) as checkpoints,
    Events(workdir, began=began, about=_about(program)) as events,
  ):
    watchdog.begins("restoring")
    with events.span("restore"):
      restored = checkpoints.restore(program.abstract, check=check)
    if restored is None:
      state, step = programs.initialize(program), 0
    else:
      state, step = restored.state, restored.step
      logging.info("restored step %d from %s", step, checkpoints.directory)
    if step >= run.total_steps:
      logging.info("the run is complete: step %d of %d", step, run.total_steps)
      events.end("complete")
      return "complete"
    events.resume(step)
    metrics = Metrics(
      workdir,
      run.metrics,
      name=run.name,
      settings=record["identity"],
      start_step=step,
      total_steps=run.total_steps,
    )
    watchdog.begins("compiling")
    with metrics, faults.StopRequest(peers) as stop:
      session = _Session(program, workdir, checkpoints, metrics, events, watchdog, record)
      outcome = session.train(state, step, stop)
    events.end(outcome)
  if jax.process_index() == 0:
    plot_losses(workdir / JSONL, workdir / "loss.png")
  logging.info("%s; metrics: %s, picture: %s", outcome, workdir / JSONL, workdir / "loss.png")
  return outcome


class _Running(NamedTuple):
  """A step that the device may still be working on."""

  step: int
  metrics: StepMetrics
  statistics: dict[str, Any] | None  # of the steps where they are due


class _Session:
  """One start of a run: from its first step to its last, or to the signal that ends it."""

  def __init__(
    self,
    program: Program,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    metrics: Metrics,
    events: Events,
    watchdog: Watchdog,
    record: dict[str, Any],
  ):
    self.run, self.program, self.workdir, self.record = program.run, program, workdir, record
    self.checkpoints, self.metrics = checkpoints, metrics
    self.events, self.watchdog = events, watchdog
    start = time.monotonic()
    with events.span("compile"):
      self.train_step = programs.compile_step(program, programs.lower_train_step(program))
      evaluates = self.run.data.eval_source is not None
      lowered = programs.lower_eval_step(program) if evaluates else None
      self.eval_step = None if lowered is None else programs.compile_step(program, lowered)
      lowered = programs.lower_statistics_step(program) if self.run.statistics.every else None
      self.statistics_step = None if lowered is None else programs.compile_step(program, lowered)
    logging.info("compiled in %.1f s", time.monotonic() - start)
    self.flops = flops_per_token(self.run.model, self.run.data.row_length).train
    chip = topology.chip_of(jax.devices()[0].device_kind)
    self.peak_flops = None if chip is None else chip.peak_flops * program.mesh.size
    self.skipped = self.skipped_in_a_row = 0

  def train(self, state: TrainState, step: int, stop: faults.StopRequest) -> Outcome:
    """Steps `step` + 1 to the last; all of them have been looked at when it returns."""
    run = self.run
    self.throughput = Throughput(
      tokens_per_step=run.batch_size * run.data.row_length,
      start_step=step,
      total_steps=run.total_steps,
    )
    running: _Running | None = None
    with self._train_batches(step) as batches, self.events.span("step"):
      while step < run.total_steps and not stop.reached(step):
        with self.throughput.waiting(), self.events.waiting():
          batch = programs.to_devices(next(batches), self.program.mesh)
        state, metrics = self.train_step(state, batch)
        step += 1
        if running is not None:
          self._finish(running)
        running = _Running(step, metrics, self._statistics(step, state, batch, metrics))

        is_last = step == run.total_steps
        kind = self.checkpoints.due(step) or ("permanent" if is_last else None)
        evaluates = self.eval_step is not None and (is_last or step % run.eval_every == 0)
        if kind or evaluates:
          # First look at the step itself: a bad one is never saved. Evaluate before saving: what a
          # restart does again, it does once.
          self._finish(running)
          running = None
          with self.throughput.excluded(after=state):
            if evaluates:
              self._evaluate(step, state)
            if kind:
              self._save(step, state, kind)
      if running is not None:
        # A signal ended the loop at a step that was not due.
        self._finish(running)
        self._save(step, state, "temporary")
    with self.events.span("checkpoint"):
      self.checkpoints.wait()
    return "complete" if step == run.total_steps else "stopped"

  def _finish(self, running: _Running) -> None:
    """Reads what a step on the device has told, once it is over; writes it if it is due."""
    step, metrics, statistics = running
    is_finite = bool(metrics.is_finite)
    self.watchdog.step(step)
    if not is_finite:
      self._not_finite(step, metrics)
    else:
      self.skipped_in_a_row = 0
    self.throughput.count_step()
    self.events.finished(step)
    if statistics is not None and bool(metrics.is_finite):
      self.metrics.write_layers(step, by_layer(self.run.model, jax.device_get(statistics)))
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
    if self.skipped:
      values["train/skipped_steps"] = self.skipped
    self.metrics.write(step, values)

  def _statistics(
    self, step: int, state: TrainState, batch: Batch, metrics: StepMetrics
  ) -> dict[str, Any] | None:
    if self.statistics_step is None or not self.run.statistics.due(step):
      return None
    return self.statistics_step(state, batch, metrics.square_norms, metrics.weight)

  def _not_finite(self, step: int, metrics: StepMetrics) -> None:
    """Records a step whose loss or gradient is not finite, and stops the run if it has to."""
    rows = pipeline.batch_addresses(self.run.data, step=step - 1, batch_size=self.run.batch_size)
    line = faults.record_bad_step(
      self.workdir,
      step=step,
      loss=float(metrics.loss),
      grad_norm=float(metrics.grad_norm),
      rows=rows,
      tensors=faults.bad_tensors(metrics.square_norms),
    )
    self.skipped += 1
    self.skipped_in_a_row += 1
    policy = self.run.non_finite
    if policy.action == "stop" or self.skipped_in_a_row > policy.max_skipped:
      raise faults.NonFiniteError(f"{line}. {faults.advice(policy, self.skipped_in_a_row)}")
    logging.warning("%s. Skipped: parameters and moments are as before", line)

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
    with self.events.span("checkpoint"):
      self.checkpoints.save(step, state, self.record, kind=kind)

  def _train_batches(self, step: int) -> pipeline.Batches:
    return pipeline.train_batches(
      self.run.data, batch_size=self.run.batch_size, start_step=step, **self._share()
    )

  def _share(self) -> dict[str, int]:
    """Which rows of a batch this process reads: where its devices lie in the mesh decides."""
    share = row_share(self.program.mesh.devices, jax.process_index())
    return {"process_index": share.index, "process_count": share.count}


def _within_the_data(run: Run) -> Run:
  """The run, ended where its data ends, after checking that its data is for its model."""
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


def _about(program: Program) -> dict[str, Any]:
  """What the report needs to know of a run beside its metrics."""
  run = program.run
  return {
    "name": run.name,
    "total_steps": run.total_steps,
    "tokens_per_step": run.batch_size * run.data.row_length,
    "row_length": run.data.row_length,
    "flops_per_token": flops_per_token(run.model, run.data.row_length).train,
    "devices": f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}",
  }


def _thousands(count: Any) -> tuple[str, str]:
  return f"{count.total:,}", f"{count.embedding:,}"
