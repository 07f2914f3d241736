"""Measures training on the devices at hand: `python -m launch.bench --config=configs/bench_cpu.py`.

Prints one JSON object. tokens_per_second: the row tokens of a step over the median time of the
timed steps, all devices; as in training, a step is dispatched while the one before runs.
compile_seconds: to trace, lower and compile the training step, with no cache. peak_bytes: what the
compiled step needs on each device (arguments, temporaries, code, and outputs that take no
argument's place); process_peak_bytes: the largest resident set of this process.
loader_tokens_per_second: the loader alone. Rows are random bytes in documents of random length; the
loader reads the config's token stores if they exist, else one made of such documents. --statistics
also times the program that runs after every `statistics.every`-th step, in turn with the steps:
of_a_step is its time over that of a step, share what it adds to the time of the run.
"""

import dataclasses
import datetime
import json
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from data import pipeline, token_store, vocabulary
from data.pipeline import DataConfig
from data.rows import Batch
from launch import host, step_times
from launch.console import must_be_finite, refuse
from launch.overrides import run_app
from models.flops import count_params
from train import program as programs
from train.config import Run
from train.program import Program
from train.state import TrainState
from train.step import NO_LIMITS

_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before the timed ones.", lower_bound=1)
_STATISTICS = flags.DEFINE_bool("statistics", False, "Times the statistics of layers too.")
_LOADER_SECONDS = flags.DEFINE_float(
  "loader_seconds", 2.0, "How long the loader is timed.", lower_bound=0.01
)

must_be_finite(_LOADER_SECONDS)


def main(run: Run, overridden: dict[str, tuple[Any, Any]]) -> None:
  host.keep_memory()
  try:
    program = programs.build(run)
    start = time.perf_counter()
    compiled = programs.compile_step(program, programs.lower_train_step(program))
    compile_seconds = time.perf_counter() - start
  except ValueError as error:
    refuse(error)

  timed = step_times.run_steps(program, compiled, warmup=_WARMUP.value, steps=_STEPS.value)
  speed = step_times.speed(program, compiled, timed)
  device = jax.devices()[0]
  result = {
    **speed,
    "tokens_per_second": round(speed["tokens_per_second"], 1),
    "compile_seconds": round(compile_seconds, 2),
    "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "loader_tokens_per_second": round(_loader_tokens_per_second(run), 1),
    "parameters": count_params(run.model).total,
    "config": run.name,
    "overrides": {path: now for path, (_, now) in overridden.items()},
    "batch_size": run.batch_size,
    "row_length": run.data.row_length,
    "num_blocks": run.model.num_blocks,
    "device": device.device_kind,
    "num_devices": len(jax.devices()),
    "machine": f"{platform.machine()}, {platform.system()}",
    "jax": jax.__version__,
    "date": datetime.date.today().isoformat(),
    "command": shlex.join(["python", "-m", "launch.bench", *sys.argv[1:]]),
  }
  if _STATISTICS.value:
    result["statistics"] = _statistics(program, compiled, timed.state, timed.batch)
  print(json.dumps(result, default=repr))


def _statistics(
  program: Program, train_step: jax.stages.Compiled, state: TrainState, batch: Batch
) -> dict[str, float | int | None]:
  """Times steps and their statistics in turn, so that other load affects both alike."""
  start = time.perf_counter()
  compiled = programs.compile_step(program, programs.lower_statistics_step(program))
  compile_seconds = time.perf_counter() - start
  ratios = []
  for _ in range(_WARMUP.value + _STEPS.value):
    start = time.perf_counter()
    state, metrics = train_step(state, batch, NO_LIMITS)
    jax.block_until_ready((state, metrics))
    middle = time.perf_counter()
    jax.block_until_ready(compiled(state, batch, metrics.square_norms, metrics.weight))
    ratios.append((time.perf_counter() - middle) / (middle - start))
  of_a_step = statistics.median(ratios[_WARMUP.value :])
  every = program.run.statistics.every
  return {
    "of_a_step": round(of_a_step, 4),
    "every": every,
    "share": round(of_a_step / every, 5) if every else None,
    "compile_seconds": round(compile_seconds, 2),
  }


def _loader_tokens_per_second(run: Run) -> float:
  """Tokens of batches read in a few seconds, by one process of this run."""
  if all(token_store.is_complete(path) for path, _ in run.data.sources):
    return _read(run.data, run.batch_size)
  with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/store"
    rng = np.random.default_rng(0)
    words = vocabulary.load("byte")
    texts = [
      bytes(rng.integers(32, 127, rng.integers(200, 8000), dtype=np.uint8)).decode()
      for _ in range(2000)
    ]
    documents = [words.encode(text) for text in texts]
    token_store.write(path, documents, words.record, text_bytes=sum(map(len, texts)))
    config = dataclasses.replace(run.data, sources=((path, 1.0),), eval_source=None)
    return _read(config, run.batch_size)


def _read(config: DataConfig, batch_size: int) -> float:
  with pipeline.train_batches(config, batch_size=batch_size, start_step=0) as batches:
    next(batches)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < _LOADER_SECONDS.value:
      tokens += next(batches).tokens_BT.size
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
  run_app(main)
