"""Times every implementation: `python -m kernels.causal_conv.measure 8,2048,2560`.

For each shape [batch, time, width], in bfloat16 and 4 taps, one JSON line: device, date, command,
bytes per second of a copy on the same device, and for each implementation that runs here the median
milliseconds of the forward pass and of forward and backward together, compile seconds and temporary
bytes of the latter, and what part of the copy's bytes per second each pass reaches.

The bytes are the least that a pass must move, whatever an implementation does: x and y forward;
backward x, both gradients of y and that of x. Runs of the implementations alternate.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from kernels import timing
from kernels.causal_conv import IMPLEMENTATIONS, convolve

_TAPS = 4
# Activations that a pass reads and writes; one result counts, because both are the same array.
_MOVED = {"forward": 2, "forward_backward": 6}
_GIVEN_OUT = slice(1)


def measure(batch: int, time_steps: int, width: int) -> dict[str, Any]:
  """Medians over alternating runs, on rows of a few documents."""
  shape = (batch, time_steps, width)
  keys = jax.random.split(jax.random.key(0), 6)
  x_BTR, dy_BTR, more_dy_BTR = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
  w_KR = jax.random.normal(keys[3], (_TAPS, width))
  starts_BT = jax.random.uniform(keys[4], shape[:2]) < 4 / time_steps
  document_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
  zeros_R = jnp.zeros((width,))

  def run(x_BTR, b_in_R, w_KR, b_R, *, name):
    return convolve(x_BTR, b_in_R, w_KR, b_R, document_BT, implementation=name)

  names = filter(timing.runs_here, IMPLEMENTATIONS)
  runs = {name: functools.partial(run, name=name) for name in names}
  arrays = (x_BTR, zeros_R, w_KR, zeros_R)
  cotangents = (dy_BTR, more_dy_BTR)
  return timing.beside_a_copy(runs, arrays, cotangents, moved=_MOVED, given_out=_GIVEN_OUT)


def main(shapes: list[str]) -> None:
  timing.print_shapes("kernels.causal_conv.measure", shapes, measure)


if __name__ == "__main__":
  main(sys.argv[1:])
