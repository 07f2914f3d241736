"""How the `measure` modules of the kernels time: which implementations, and what a call takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_RUNS = 7
# Calls of a run: the device works on one while the next is dispatched.
_CALLS = 5


def runs_here(implementation: str) -> bool:
  """Whether this platform has it: kernels for one platform alone are named after it."""
  platform = implementation.rpartition("_")[2]
  return platform not in ("tpu", "gpu") or platform == jax.default_backend()


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
  """Seconds of one call of each; their runs alternate, and the first, a warm-up, does not count."""
  seconds: dict[str, list[float]] = {key: [] for key in calls}
  for _ in range(_RUNS + 1):
    for key, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready([call() for _ in range(_CALLS)])
      seconds[key].append((time.perf_counter() - start) / _CALLS)
  return {key: statistics.median(values[1:]) for key, values in seconds.items()}
