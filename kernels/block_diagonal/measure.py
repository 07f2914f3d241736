"""Times every implementation: `python -m kernels.block_diagonal.measure 8,2048,2560 8,2048,5632`.

For each shape [batch, time, width], in bfloat16 and 16 blocks, one JSON line: device, date,
command, bytes per second of a copy on the same device, and for each implementation that runs here
the median milliseconds of the forward pass and of forward and backward together, compile seconds
and temporary bytes of the latter, and what part of the copy's bytes per second each pass reaches.

The bytes are the least that a pass must move, whatever an implementation does: x, r and i forward;
backward x, dr, di and dx. Runs of the implementations alternate.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from kernels import timing
from kernels.block_diagonal import IMPLEMENTATIONS, products

_BLOCKS = 16
# Activations that a pass reads and writes.
_MOVED = {"forward": 3, "forward_backward": 7}


def measure(batch: int, time_steps: int, width: int) -> dict[str, Any]:
  """Medians over alternating runs."""
  size = width // _BLOCKS
  keys = jax.random.split(jax.random.key(0), 4)
  x_BTR, dr_BTR, di_BTR = (
    jax.random.normal(key, (batch, time_steps, width), jnp.bfloat16) for key in keys[:3]
  )
  w_GI2J = jax.random.normal(keys[3], (_BLOCKS, size, 2, size), jnp.bfloat16) * size**-0.5
  arrays = (x_BTR, w_GI2J, jnp.zeros((_BLOCKS, 2, size)))
  names = filter(timing.runs_here, IMPLEMENTATIONS)
  runs = {name: functools.partial(products, implementation=name) for name in names}
  return timing.beside_a_copy(runs, arrays, (dr_BTR, di_BTR), moved=_MOVED)


def main(shapes: list[str]) -> None:
  timing.print_shapes("kernels.block_diagonal.measure", shapes, measure)


if __name__ == "__main__":
  main(sys.argv[1:])
