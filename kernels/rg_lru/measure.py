"""Times every implementation: `python -m kernels.rg_lru.measure 8,2048,2560 1,65536,2560`.

For each shape [batch, time, width], in bfloat16, one JSON line: device, date, command, bytes per
second of a copy on the same device, and for each implementation that runs here the median
milliseconds of the forward pass and of forward and backward together, compile seconds and temporary
bytes of the latter, and what part of the copy's bytes per second each pass reaches.

The bytes are the least that a pass must move, whatever an implementation does: x, r, i and y
forward; backward x, r, i, y, dy, dx, dr and di. The targets on an accelerator are 0.8 forward and
0.7 for both together. Runs of the implementations alternate.
"""

import functools
import sys
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

  def run(x_BTR, r_BTR, i_BTR, decay_R, h0_BR, *, name):
    arrays = (x_BTR, r_BTR, i_BTR, decay_R, is_start_BT, h0_BR)
    return rg_lru(*arrays, implementation=name)

  names = filter(timing.runs_here, IMPLEMENTATIONS)
  runs = {name: functools.partial(run, name=name) for name in names}
  return timing.beside_a_copy(runs, arrays, (dy_BTR, jnp.zeros_like(h0_BR)), moved=_MOVED)


def main(shapes: list[str]) -> None:
  timing.print_shapes("kernels.rg_lru.measure", shapes, measure)


if __name__ == "__main__":
  main(sys.argv[1:])
