"""The TPU compiler's estimate of the kernels' cycles: `python -m kernels.rg_lru.cycles`.

Prints the estimates of kernels/cycle_estimate.py for the chips named, or for all.
"""

import functools
import sys

from kernels.cycle_estimate import Shape, print_estimates  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kernels.linear_scan import pallas_tpu as linear_scan
from kernels.rg_lru import pallas_tpu as rg_lru

# Read and written for each state in bfloat16, each activation once.
_STATE_BYTES = {"rg_lru_forward": 8, "rg_lru_backward": 16, "linear_scan": 8}


def _calls(shape: Shape, sharding: SingleDeviceSharding) -> dict:
  """Kernel -> function and its arguments, in bfloat16."""

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  batch, time, width = shape
  x_BTR, h_BR = array(shape, jnp.bfloat16), array((batch, width), jnp.float32)
  starts_BT, decay_R = array((batch, time), jnp.bool_), array((width,), jnp.float32)
  inputs = (x_BTR, x_BTR, x_BTR, decay_R, starts_BT, h_BR)
  scan = functools.partial(linear_scan.scan, reverse=False)
  return {
    "rg_lru_forward": (rg_lru.forward, inputs),
    "rg_lru_backward": (rg_lru.backward, (*inputs, x_BTR, x_BTR, h_BR)),
    "linear_scan": (scan, (x_BTR, array(shape, jnp.float32), h_BR)),
  }


if __name__ == "__main__":
  command = "kernels.rg_lru.cycles"
  print_estimates(sys.argv[1:], _calls, state_bytes=_STATE_BYTES, command=command)
