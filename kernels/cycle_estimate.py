"""The TPU compiler's own estimate of the cycles of Pallas kernels: no chip is needed or timed.

The compiler knows the instructions of a tile and assumes that its copies are on time. It steps
through every tile, which takes memory and minutes, so only a part is compiled, and the result
scaled. Import this before anything loads libtpu, because its output is configured when it is
loaded. It works for the generations whose profile the compiler can write: v5e, v5p, v6e.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_PROFILES = Path(tempfile.mkdtemp())
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={_PROFILES}"

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from kernels.compiler_record import print_record  # noqa: E402


class Clocked(NamedTuple):
  """A chip to compile for. `clock` of a TensorCore in Hz is inferred, not from a data sheet; the
  other numbers are those of sharding/topology.py, which kernels do not import."""

  topology: str
  clock: float
  bytes_per_second: float
  peak_flops: float


CHIPS = {
  "v5e": Clocked("v5e:2x2", 1.5e9, 819e9, 197e12),
  "v5p": Clocked("v5p:2x2x1", 1.75e9, 2765e9, 459e12),
  "v6e": Clocked("v6e:2x2", 1.75e9, 1638e9, 918e12),
}


Shape = tuple[int, int, int]
# What is compiled of shapes [batch, time, width]: with the same tiles (two of a row alone, one of
# several).
_PARTS: dict[Shape, Shape] = {
  (8, 2048, 2560): (2, 2048, 2560),
  (1, 65536, 2560): (1, 2048, 2560),
}


def sharding_on(chip: str) -> SingleDeviceSharding:
  """The sharding of arguments on one chip of that kind."""
  topology = topologies.get_topology_desc(topology_name=CHIPS[chip].topology, platform="tpu")
  return SingleDeviceSharding(topology.devices[0])


def estimated_cycles(run: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, int]:
  """The cycles of the operations that `run` compiles to, summed by name without numbers."""
  for path in _PROFILES.iterdir():
    path.unlink()
  jax.jit(run).lower(*arguments).compile()
  found: dict[str, int] = {}
  for path in _PROFILES.iterdir():
    text = path.read_text(errors="replace")
    for name, cycles in re.findall(
      r'hlo_op_name: "([^"]*)".*?estimated_cycles: (\d+)', text, re.DOTALL
    ):
      name = re.sub(r"[.\d]+$", "", name)
      found[name] = found.get(name, 0) + int(cycles)
  return found


def print_estimates(
  chips: list[str],
  calls: Callable[[Shape, SingleDeviceSharding], Mapping[str, tuple[Callable[..., Any], tuple]]],
  *,
  state_bytes: Mapping[str, int],
  command: str,
) -> None:
  """A JSON line for each chip (all of CHIPS if none), shape and kernel: estimated cycles and
  microseconds, beside those that its bytes take at the chip's bandwidth.

  `calls` gives each kernel as a function and its arguments, in bfloat16. A part of the rows or of
  the time is compiled and the result scaled; what starts and ends a call is counted several times.
  """
  for chip in chips or list(CHIPS):
    where = sharding_on(chip)
    _, clock, bandwidth, _ = CHIPS[chip]
    for (batch, time, width), part in _PARTS.items():
      for kernel, (run, arguments) in calls(part, where).items():
        (cycles,) = [n for name, n in estimated_cycles(run, arguments).items() if kernel in name]
        cycles *= batch * time // (part[0] * part[1])
        record = {
          "chip": chip,
          "kernel": kernel,
          "shape": [batch, time, width],
          "compiled_shape": part,
          "dtype": "bfloat16",
          "estimated_cycles": cycles,
          "estimated_us": round(1e6 * cycles / clock, 1),
          "memory_us": round(1e6 * batch * time * width * state_bytes[kernel] / bandwidth, 1),
          "bytes_per_state": state_bytes[kernel],
        }
        print_record(record, command=f"{command} {chip}")
