"""How long a compiled training step takes on the devices at hand, on rows of random tokens."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from data.rows import Batch
from models.flops import flops_per_token
from sharding import topology
from sharding.mesh import row_share
from train import program as programs
from train.config import Run
from train.program import Program
from train.state import TrainState
from train.step import NO_LIMITS, StepMetrics
from train.telemetry.throughput import mfu


class Steps(NamedTuple):
  """Seconds of each timed step; and what is left behind the last."""

  seconds: list[float]
  state: TrainState
  batch: Batch
  metrics: StepMetrics


def run_steps(program: Program, compiled: jax.stages.Compiled, *, warmup: int, steps: int) -> Steps:
  """`steps` timed ones after `warmup` others, at least one, all on one batch, from the initial
  state. As in training, a step is under way while the next one is dispatched; its seconds are
  those from the end of the step before it to its own."""
  if warmup < 1:
    raise ValueError(f"run_steps: {warmup} steps before the timed ones must be at least 1")
  state, metrics = programs.initialize(program), None
  share = row_share(program.mesh.devices, jax.process_index())
  batch = programs.to_devices(_random_batch(program.run, num_shares=share.count), program.mesh)

  def step() -> StepMetrics:
    nonlocal state, metrics
    state, metrics = compiled(state, batch, NO_LIMITS)
    return metrics

  # A CPU runs a step while it is dispatched: looked at later, it seems to end with the next one.
  ahead = 0 if program.mesh.devices.flat[0].platform == "cpu" else 1
  ends = _ends(step, warmup + steps, ahead=ahead)
  assert metrics is not None
  seconds = [end - start for start, end in itertools.pairwise(ends[warmup - 1 :])]
  return Steps(seconds, state, batch, metrics)


def _ends(step: Callable[[], Any], steps: int, *, ahead: int) -> list[float]:
  """When each of the steps is over; `ahead` more are dispatched before one is waited for."""
  ends, under_way = [], []
  for left in reversed(range(steps)):
    under_way.append(step())
    while len(under_way) > min(ahead, left):
      ends.append(_end_of(under_way.pop(0)))
  return ends


def _end_of(results: Any) -> float:
  jax.block_until_ready(results)
  return time.perf_counter()


def speed(program: Program, compiled: jax.stages.Compiled, timed: Steps) -> dict[str, Any]:
  """What is recorded of timed steps. Tokens/s are of all devices, peak_bytes of each; the MFU of a
  chip that is not known is None."""
  run, devices = program.run, program.mesh.devices
  chip = topology.chip_of(devices.flat[0].device_kind)
  median = statistics.median(timed.seconds)
  tokens_per_second = run.batch_size * run.data.row_length / median
  flops = flops_per_token(run.model, run.data.row_length).train
  return {
    "tokens_per_second": tokens_per_second,
    "step_seconds": {
      "median": median,
      "min": min(timed.seconds),
      "max": max(timed.seconds),
      "steps": len(timed.seconds),
    },
    "mfu": chip
    and mfu(
      flops_per_token=flops,
      tokens_per_second=tokens_per_second,
      peak_flops=chip.peak_flops * devices.size,
    ),
    "train_flops_per_token": flops,
    "peak_bytes": _peak_bytes(compiled),
    "loss": float(timed.metrics.loss),
  }


def _random_batch(run: Run, *, num_shares: int) -> Batch:
  """Rows of random tokens in documents of random length, a few to a row."""
  rng = np.random.default_rng(0)
  shape = (run.batch_size // num_shares, run.data.row_length)
  window = rng.integers(0, run.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
  starts = rng.random(shape) < 4 / run.data.row_length
  segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
  weights = np.concatenate([segments[:, 1:] == segments[:, :-1], np.ones((shape[0], 1), bool)], 1)
  return Batch(window[:, :-1], window[:, 1:], segments, weights.astype(np.float32))


def _peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes per device while the step runs."""
  memory = compiled.memory_analysis()
  assert memory is not None
  new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
    + new_outputs
  )
