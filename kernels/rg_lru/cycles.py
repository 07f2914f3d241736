"""The TPU compiler's estimate of the kernels' cycles: `python -m kernels.rg_lru.cycles`.

One JSON line for each chip, shape and kernel: estimated cycles and microseconds, beside those that
its bytes take at the chip's bandwidth (kernels/cycle_estimate.py). A part of the rows or of the
time is compiled and the result scaled; what starts and ends a call is then counted several times.
"""

import datetime
import functools
import json
import sys
from importlib import metadata

from kernels.cycle_estimate import CHIPS, estimated_cycles, sharding_on  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kernels.linear_scan import pallas_tpu as linear_scan
from kernels.rg_lru import pallas_tpu as rg_lru

# Read and written for each state in bfloat16, each activation once.
_STATE_BYTES = {"rg_lru_forward": 8, "rg_lru_backward": 16, "linear_scan": 8}
# What is compiled of each: with the same tiles (two of a row alone, one of several).
_PARTS = {(8, 2048, 2560): (2, 2048, 2560), (1, 65536, 2560): (1, 2048, 2560)}


def _calls(shape: tuple[int, int, int], sharding: SingleDeviceSharding) -> dict:
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


def main(chips: list[str]) -> None:
  for chip in chips or list(CHIPS):
    where = sharding_on(chip)
    _, clock, bandwidth, _ = CHIPS[chip]
    for (batch, time, width), part in _PARTS.items():
      scale = batch * time // (part[0] * part[1])
      for kernel, (run, arguments) in _calls(part, where).items():
        state_bytes = _STATE_BYTES[kernel]
        (cycles,) = [n for name, n in estimated_cycles(run, arguments).items() if kernel in name]
        cycles *= scale
        floor = 1e6 * batch * time * width * state_bytes / bandwidth
        record = {
          "chip": chip,
          "kernel": kernel,
          "shape": [batch, time, width],
          "compiled_shape": part,
          "dtype": "bfloat16",
          "estimated_cycles": cycles,
          "estimated_us": round(1e6 * cycles / clock, 1),
          "memory_us": round(floor, 1),
          "bytes_per_state": state_bytes,
          "jax": jax.__version__,
          "libtpu": metadata.version("libtpu"),
          "date": datetime.date.today().isoformat(),
          "command": f"python -m kernels.rg_lru.cycles {chip}",
        }
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
  main(sys.argv[1:])
