"""Times every implementation: `python -m kernels.linear_scan.measure 4,1024,256 8,2048,1024`.

For each shape [batch, time, width], one JSON line: device, date, command, and for each
implementation that runs here the median milliseconds of the forward pass and of forward and
backward together, compile seconds of the latter, and its temporary bytes. Runs of the
implementations alternate.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from kernels import timing
from kernels.linear_scan import IMPLEMENTATIONS, linear_scan

_RUNS = 7


def measure(batch: int, time_steps: int, width: int, dtype: str) -> dict:
  """Medians over alternating runs, for x in `dtype` and float32 decays."""
  shape = (batch, time_steps, width)
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = (
    jax.random.normal(keys[0], shape).astype(dtype),
    jax.random.uniform(keys[1], shape, minval=0.9),
    jnp.zeros((batch, width)),
  )
  weights = jax.random.normal(keys[2], shape)
  programs, results = {}, {}
  for name in filter(timing.runs_here, IMPLEMENTATIONS):

    def loss(x, a, h0, name=name):
      # Elementwise work on either side, as in a model, where reading and writing are not free.
      y, _ = linear_scan(x * 1.01, a * 0.999, h0, implementation=name)
      return jnp.sum(jnp.tanh(y.astype(jnp.float32)) * weights)

    forward = jax.jit(loss).lower(*arrays).compile()
    start = time.perf_counter()
    both = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    memory = both.memory_analysis()
    results[name] = {
      "compile_seconds": round(time.perf_counter() - start, 2),
      "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }
    programs[name] = {"forward_ms": forward, "forward_backward_ms": both}
  seconds = {(name, part): [] for name in programs for part in programs[name]}
  for _ in range(_RUNS + 1):
    for name, part in seconds:
      start = time.perf_counter()
      jax.block_until_ready(programs[name][part](*arrays))
      seconds[name, part].append(time.perf_counter() - start)
  for (name, part), values in seconds.items():
    results[name][part] = round(1e3 * statistics.median(values[1:]), 2)
  return results


def main(shapes: list[str]) -> None:
  for text in shapes:
    batch, time_steps, width = map(int, text.split(","))
    for dtype in ("float32", "bfloat16"):
      record = {
        "shape": [batch, time_steps, width],
        "dtype": dtype,
        **timing.circumstances("kernels.linear_scan.measure", text),
        "implementations": measure(batch, time_steps, width, dtype),
      }
      sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
