"""How the `measure` modules of the kernels time: which implementations, and what a call takes."""

import datetime
import statistics
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


def beside_a_copy(
  passes: Mapping[str, Mapping[str, Callable[[], Any]]], x: jax.Array, moved: Mapping[str, int]
) -> dict[str, Any]:
  """What is recorded of passes[implementation][pass], each of which moves at least moved[pass]
  arrays like x: milliseconds, and what part of the bytes per second of a copy of x it reaches."""
  copy = jax.jit(jnp.negative).lower(x).compile()
  calls = {(name, part): call for name, parts in passes.items() for part, call in parts.items()}
  seconds = medians({**calls, "copy": lambda: copy(x)})
  copied = 2 * x.nbytes / seconds["copy"]
  implementations = {name: {} for name in passes}
  for name, part in calls:
    value = seconds[name, part]
    implementations[name][f"{part}_ms"] = round(1e3 * value, 3)
    implementations[name][f"{part}_of_copy"] = round(moved[part] * x.nbytes / value / copied, 3)
  return {"copy_bytes_per_second": round(copied), "implementations": implementations}


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
