"""The TPU compiler's estimate of the kernels' cycles: `python -m kernels.causal_conv.cycles`.

Prints the estimates of kernels/cycle_estimate.py for the chips named, or for all.
"""

import sys

from kernels.cycle_estimate import Shape, print_estimates  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kernels.causal_conv import pallas_tpu

_TAPS = 4
# Read and written for each channel and token in bfloat16, each activation once.
_STATE_BYTES = {"causal_conv_forward": 4, "causal_conv_backward": 8}


def _calls(shape: Shape, sharding: SingleDeviceSharding) -> dict:
  """Kernel -> function and its arguments, in bfloat16."""

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  batch, time, width = shape
  x_BTR, b_R = array(shape, jnp.bfloat16), array((width,), jnp.float32)
  w_KR, same = array((_TAPS, width), jnp.float32), [array((batch, time), jnp.bool_)] * (_TAPS - 1)
  return {
    "causal_conv_forward": (pallas_tpu.forward, (x_BTR, b_R, w_KR, b_R, same)),
    "causal_conv_backward": (pallas_tpu.backward, (x_BTR, b_R, w_KR, same, x_BTR, x_BTR)),
  }


if __name__ == "__main__":
  command = "kernels.causal_conv.cycles"
  print_estimates(sys.argv[1:], _calls, state_bytes=_STATE_BYTES, command=command)
