"""The TPU compiler's estimate of the kernels' cycles: `python -m kernels.rg_lru.cycles`.

One JSON line for each chip, shape and kernel: estimated cycles and microseconds, beside those that
its bytes take at the chip's bandwidth. No chip is needed and none is timed: these are estimates by
a compiler that knows the instructions of a tile and takes its copies to be on time. It steps
through every tile, which takes memory and minutes, so that a part of the rows or of the time is
compiled and the result scaled; what starts and ends a call is then counted several times.

For the generations whose profile the compiler can write: v5e, v5p, v6e. On CPU, with libtpu there.
"""

import datetime
import functools
import json
import os
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# Read when the compiler is loaded, which the first topology does.
_PROFILES = Path(tempfile.mkdtemp())
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={_PROFILES}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from kernels.linear_scan import pallas_tpu as linear_scan  # noqa: E402
from kernels.rg_lru import pallas_tpu as rg_lru  # noqa: E402

# Topology, TensorCore clock in Hz (a lead, not from a data sheet) and memory bandwidth in bytes/s
# (as in sharding/topology.py, which kernels do not import).
CHIPS = {
  "v5e": ("v5e:2x2", 1.5e9, 819e9),
  "v5p": ("v5p:2x2x1", 1.75e9, 2765e9),
  "v6e": ("v6e:2x2", 1.75e9, 1638e9),
}
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


def estimated_cycles(chip: str, shape: tuple[int, int, int], kernel: str) -> int:
  """Of one call of the kernel at `shape`, from the profile that the compiler writes."""
  topology = topologies.get_topology_desc(topology_name=CHIPS[chip][0], platform="tpu")
  run, arguments = _calls(shape, SingleDeviceSharding(topology.devices[0]))[kernel]
  for path in _PROFILES.iterdir():
    path.unlink()
  jax.jit(run).lower(*arguments).compile()
  texts = [path.read_text(errors="replace") for path in _PROFILES.iterdir()]
  pattern = rf'hlo_op_name: "{kernel}[^"]*".*?estimated_cycles: (\d+)'
  (cycles,) = [int(n) for text in texts for n in re.findall(pattern, text, re.DOTALL)]
  return cycles


def main(chips: list[str]) -> None:
  for chip in chips or list(CHIPS):
    _, clock, bandwidth = CHIPS[chip]
    for (batch, time, width), part in _PARTS.items():
      scale = batch * time // (part[0] * part[1])
      for kernel, state_bytes in _STATE_BYTES.items():
        cycles = scale * estimated_cycles(chip, part, kernel)
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
