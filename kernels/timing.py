"""Timing for the kernels' `measure` modules: which implementations run, and how long calls take."""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Seconds of calls in a run; the device works on one call while the next is dispatched. And how many
# runs there are of each program, fewer if its calls are slow.
_RUN_SECONDS = 0.02
_RUNS = 7
_SLOW_SECONDS, _SLOW_RUNS = 0.2, 3
# On accelerators calls shorter than this wait for their dispatch: this many become one program.
_SHORT_SECONDS, _IN_TURN = 1e-3, 20


def runs_here(implementation: str) -> bool:
  """Whether an implementation runs here: those for one platform are named after it."""
  platform = implementation.rpartition("_")[2]
  return platform not in ("tpu", "gpu") or platform == jax.default_backend()


class Compiled(NamedTuple):
  """A program that runs something `times` times in turn."""

  program: Callable[[], Any]
  times: int = 1


def compiled(
  run: Callable[..., Any], arguments: tuple[Any, ...], once: jax.stages.Compiled | None = None
) -> Compiled:
  """The program of run(*arguments): `_IN_TURN` calls if one is short and the device has a queue.
  `once` is the compiled single call, if there is one already."""
  if once is None:
    once = jax.jit(run).lower(*arguments).compile()
  found = Compiled(lambda: once(*arguments))
  if jax.default_backend() == "cpu":
    return found
  _seconds_of(found.program, 1)
  if _seconds_of(found.program, 1) > _SHORT_SECONDS:
    return found
  return in_turn(run, arguments, _IN_TURN)


def in_turn(run: Callable[..., Any], arguments: tuple[Any, ...], times: int) -> Compiled:
  """run(*arguments) `times` times in one program, each after the one before has all its results: to
  enforce that, 0 times one number of each result is added to the smallest argument."""
  leaves, tree = jax.tree.flatten(arguments)
  floats = [index for index, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
  smallest = min(floats, key=lambda index: leaves[index].size)

  def loop(leaves):
    def one(_, carry):
      small, _ = carry
      results = run(*tree.unflatten([*leaves[:smallest], small, *leaves[smallest + 1 :]]))
      numbers = [y[(0,) * y.ndim].astype(jnp.float32) for y in jax.tree.leaves(results)]
      return small + (0.0 * jnp.sum(jnp.stack(numbers))).astype(small.dtype), results

    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(run, *arguments))
    return jax.lax.fori_loop(0, times, one, (leaves[smallest], zeros))

  program = jax.jit(loop).lower(leaves).compile()
  return Compiled(lambda: program(leaves), times)


def medians(programs: Mapping[Any, Compiled]) -> dict[Any, float]:
  """Median seconds of one call of each; their runs alternate, after a call that does not count."""
  per_run: dict[Any, int] = {}
  seconds: dict[Any, list[float]] = {key: [] for key in programs}
  for key, (call, _) in programs.items():
    _seconds_of(call, 1)
    per_run[key] = max(1, round(_RUN_SECONDS / _seconds_of(call, 1)))
  for run in range(_RUNS):
    for key, (call, times) in programs.items():
      if run < _SLOW_RUNS or seconds[key][0] < _SLOW_SECONDS:
        seconds[key].append(_seconds_of(call, per_run[key]) / times)
  return {key: statistics.median(values) for key, values in seconds.items()}


def two_passes(
  runs: Mapping[str, Callable[..., tuple[jax.Array, ...]]],
  arrays: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, ...],
  *,
  given_out: slice = slice(None),
) -> tuple[dict[tuple[str, str], Compiled], dict[str, dict[str, Any]]]:
  """The programs of every implementation: (name, "forward") is runs[name](*arrays), and
  (name, "forward_backward") the same with the gradients of all arrays. Also, by name, the compile
  seconds and temporary bytes of the latter. `given_out` selects the results that are arrays of
  their own: one that is returned twice would be copied each time that `in_turn` runs it."""
  programs: dict[tuple[str, str], Compiled] = {}
  implementations: dict[str, dict[str, Any]] = {}
  for name, run in runs.items():

    def forward(*arrays, run=run):
      return run(*arrays)[given_out]

    def gradients(cotangents, *arrays, run=run):
      results, pull_back = jax.vjp(run, *arrays)
      dy = tuple(d.astype(y.dtype) for d, y in zip(cotangents, results, strict=True))
      # With the results: otherwise XLA drops what the backward pass does not need of the forward
      # pass.
      return results[given_out], pull_back(dy)

    start = time.perf_counter()
    both = jax.jit(gradients).lower(cotangents, *arrays).compile()
    memory = both.memory_analysis()
    implementations[name] = {
      "compile_seconds": round(time.perf_counter() - start, 2),
      "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }
    programs[name, "forward"] = compiled(forward, arrays)
    programs[name, "forward_backward"] = compiled(gradients, (cotangents, *arrays), both)
  return programs, implementations


def beside_a_copy(
  runs: Mapping[str, Callable[..., tuple[jax.Array, ...]]],
  arrays: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, ...],
  *,
  moved: Mapping[str, int],
  given_out: slice = slice(None),
) -> dict[str, Any]:
  """The record of implementations; arguments as for `two_passes`. For each: milliseconds, compile
  seconds, temporary bytes, and its share of a copy's bytes per second, where a pass moves at least
  moved[pass] arrays like the first."""
  programs, implementations = two_passes(runs, arrays, cotangents, given_out=given_out)
  size = arrays[0].nbytes
  seconds = medians({**programs, "copy": _copy(arrays[0])})
  copied = 2 * size / seconds["copy"]
  for name, part in programs:
    value = seconds[name, part]
    implementations[name][f"{part}_ms"] = round(1e3 * value, 3)
    implementations[name][f"{part}_of_copy"] = round(moved[part] * size / value / copied, 3)
  return {"copy_bytes_per_second": round(copied), "implementations": implementations}


def _copy(x: jax.Array) -> Compiled:
  """The program of -x, repeated as often as makes a program worth timing."""
  times = 1 if jax.default_backend() == "cpu" else _IN_TURN
  program = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: -y, x)).lower(x).compile()
  return Compiled(lambda: program(x), times)


def print_shapes(
  module: str, shapes: list[str], measure: Callable[[int, int, int], dict[str, Any]]
) -> None:
  """Prints a JSON line for each "batch,time,width", for arrays in bfloat16."""
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
  """The device, jax version, date and command of a measurement by `python -m module argument`."""
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
