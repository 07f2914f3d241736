"""How the `measure` modules of the kernels time: which implementations, and what a call takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

# Seconds of calls in a run: the device works on one while the next is dispatched. And runs of each,
# of which those with slow calls are fewer.
_RUN_SECONDS = 0.02
_RUNS = 7
_SLOW_SECONDS, _SLOW_RUNS = 0.2, 3


def runs_here(implementation: str) -> bool:
  """Whether this platform has it: kernels for one platform alone are named after it."""
  platform = implementation.rpartition("_")[2]
  return platform not in ("tpu", "gpu") or platform == jax.default_backend()


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
  """Seconds of one call of each; their runs alternate, after a call that does not count."""
  per_run: dict[str, int] = {}
  seconds: dict[str, list[float]] = {key: [] for key in calls}
  for key, call in calls.items():
    _seconds_of(call, 1)
    per_run[key] = max(1, round(_RUN_SECONDS / _seconds_of(call, 1)))
  for run in range(_RUNS):
    for key, call in calls.items():
      if run < _SLOW_RUNS or seconds[key][0] < _SLOW_SECONDS:
        seconds[key].append(_seconds_of(call, per_run[key]))
  return {key: statistics.median(values) for key, values in seconds.items()}


def _seconds_of(call: Callable[[], Any], times: int) -> float:
  start = time.perf_counter()
  results = None
  for _ in range(times):
    results = call()
  jax.block_until_ready(results)
  return (time.perf_counter() - start) / times
