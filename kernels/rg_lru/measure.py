"""Times every implementation: `python -m kernels.rg_lru.measure 8,2048,2560 1,65536,2560`.

For each shape [batch, time, width], in bfloat16, one JSON line: device, date, command, bytes per
second of a copy on the same device, and for each implementation that runs here the median
milliseconds of the forward pass and of forward and backward together, compile seconds and temporary
bytes of the latter, and what part of the copy's bytes per second each pass reaches.

The bytes are the least that a pass must move, whatever an implementation does: x, r, i and y
forward; backward x, r, i, y, dy, dx, dr and di. The bars on an accelerator are 0.8 forward and 0.7
for both together. Runs of the implementations alternate.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import timing
from kernels.rg_lru import IMPLEMENTATIONS, rg_lru

# Activations that a pass reads and writes.
_MOVED = {"forward": 4, "forward_backward": 12}


def measure(batch: int, time_steps: int, width: int) -> dict[str, Any]:
  """Medians over alternating runs, for x, r and i in bfloat16."""
  shape = (batch, time_steps, width)
  keys = jax.random.split(jax.random.key(0), 4)
  x_BTR, r_BTR, i_BTR, dy_BTR = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
  decay_R, h0_BR = jnp.linspace(-9.0, -4.0, width), jnp.zeros((batch, width))
  is_start_BT = jnp.zeros((batch, time_steps), bool).at[:, 0].set(True)
  arrays = (x_BTR, r_BTR, i_BTR, decay_R, h0_BR)
  passes: dict[str, dict[str, Callable[[], Any]]] = {}
  results: dict[str, dict[str, Any]] = {}
  for name in filter(timing.runs_here, IMPLEMENTATIONS):

    def run(x_BTR, r_BTR, i_BTR, decay_R, h0_BR, name=name):
      arrays = (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR)
      return rg_lru(*arrays, implementation=name)

    def gradients(dy_BTR, *arrays, run=run):
      _, pull_back = jax.vjp(run, *arrays)
      return pull_back((dy_BTR, jnp.zeros_like(h0_BR)))

    forward = jax.jit(run).lower(*arrays).compile()
    start = time.perf_counter()
    both = jax.jit(gradients).lower(dy_BTR, *arrays).compile()
    memory = both.memory_analysis()
    results[name] = {
      "compile_seconds": round(time.perf_counter() - start, 2),
      "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
    }
    passes[name] = {
      "forward": lambda forward=forward: forward(*arrays),
      "forward_backward": lambda both=both: both(dy_BTR, *arrays),
    }
  timed = timing.beside_a_copy(passes, x_BTR, _MOVED)
  for name, result in results.items():
    timed["implementations"][name] = {**result, **timed["implementations"][name]}
  return timed


def main(shapes: list[str]) -> None:
  for text in shapes:
    batch, time_steps, width = map(int, text.split(","))
    record = {
      "shape": [batch, time_steps, width],
      "dtype": "bfloat16",
      **timing.circumstances("kernels.rg_lru.measure", text),
      **measure(batch, time_steps, width),
    }
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
