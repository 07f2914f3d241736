"""How the `measure` modules of the kernels time: which implementations, and what a call takes."""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Seconds of calls in a run: the device works on one while the next is dispatched. And runs of each,
# of which those with slow calls are fewer.
_RUN_SECONDS = 0.02
_RUNS = 7
_SLOW_SECONDS, _SLOW_RUNS = 0.2, 3


def runs_here(implementation: str) -> bool:
  """Whether this platform has it: kernels for one platform alone are named after it."""
  platform = implementation.rpartition("_")[2]
  return platform not in ("tpu", "gpu") or platform == jax.default_backend()


def medians(calls: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
  """Seconds of one call of each; their runs alternate, after a call that does not count."""
  per_run: dict[Any, int] = {}
  seconds: dict[Any, list[float]] = {key: [] for key in calls}
  for key, call in calls.items():
    _seconds_of(call, 1)
    per_run[key] = max(1, round(_RUN_SECONDS / _seconds_of(call, 1)))
  for run in range(_RUNS):
    for key, call in calls.items():
      if run < _SLOW_RUNS or seconds[key][0] < _SLOW_SECONDS:
        seconds[key].append(_seconds_of(call, per_run[key]))
  return {key: statistics.median(values) for key, values in seconds.items()}


def two_passes(
  runs: Mapping[str, Callable[..., tuple[jax.Array, ...]]],
  arrays: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, ...],
) -> tuple[dict[tuple[str, str], Callable[[], Any]], dict[str, dict[str, Any]]]:
  """Of every implementation, compiled: the calls of (name, "forward"), which is
  runs[name](*arrays), and of (name, "forward_backward"), that with the gradients of all arrays; and
  by name compile seconds and temporary bytes of the latter."""
  calls: dict[tuple[str, str], Callable[[], Any]] = {}
  implementations: dict[str, dict[str, Any]] = {}
  for name, run in runs.items():

    def gradients(cotangents, *arrays, run=run):
      results, pull_back = jax.vjp(run, *arrays)
      return pull_back(tuple(d.astype(y.dtype) for d, y in zip(cotangents, results, strict=True)))

    forward = jax.jit(run).lower(*arrays).compile()
    start = time.perf_counter()
    both = jax.jit(gradients).lower(cotangents, *arrays).compile()
    memory = both.memory_analysis()
    implementations[name] = {
      "compile_seconds": round(time.perf_counter() - start, 2),
      "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }
    calls[name, "forward"] = lambda forward=forward: forward(*arrays)
    calls[name, "forward_backward"] = lambda both=both: both(cotangents, *arrays)
  return calls, implementations


def beside_a_copy(
  runs: Mapping[str, Callable[..., tuple[jax.Array, ...]]],
  arrays: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, ...],
  *,
  moved: Mapping[str, int],
) -> dict[str, Any]:
  """What is recorded of implementations, arguments as of `two_passes`. Each moves at least
  moved[pass] arrays like the first: milliseconds, and what part of the bytes per second of a copy
  of it they reach; compile seconds and temporary bytes."""
  calls, implementations = two_passes(runs, arrays, cotangents)
  copy, size = jax.jit(jnp.negative).lower(arrays[0]).compile(), arrays[0].nbytes
  seconds = medians({**calls, "copy": lambda: copy(arrays[0])})
  copied = 2 * size / seconds["copy"]
  for name, part in calls:
    value = seconds[name, part]
    implementations[name][f"{part}_ms"] = round(1e3 * value, 3)
    implementations[name][f"{part}_of_copy"] = round(moved[part] * size / value / copied, 3)
  return {"copy_bytes_per_second": round(copied), "implementations": implementations}


def print_shapes(
  module: str, shapes: list[str], measure: Callable[[int, int, int], dict[str, Any]]
) -> None:
  """A JSON line for each "batch,time,width", of arrays in bfloat16."""
  for text in shapes:
    batch, time_steps, width = map(int, text.split(","))
    record = {
      "shape": [batch, time_steps, width],
      "dtype": "bfloat16",
      **circumstances(module, text),
      **measure(batch, time_steps, width),
    }
    sys.stdout.write(json.dumps(record) + "\n")


def circumstances(module: str, argument: str) -> dict[str, str]:
  """Of a measurement by `python -m module argument`: device, jax, date and command."""
  return {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "date": datetime.date.today().isoformat(),
    "command": f"python -m {module} {argument}",
  }


def _seconds_of(call: Callable[[], Any], times: int) -> float:
  start = time.perf_counter()
  results = None
  for _ in range(times):
    results = call()
  jax.block_until_ready(results)
  return (time.perf_counter() - start) / times
