"""A machine that need not be here: its devices, how they are connected, and a mesh's links on it.

An island is a set of devices with fast links: a slice of TPUs (ICI) or a node of GPUs (NVLink).
Islands are connected by the data center's network (DCN). Devices are numbered island by island, and
a mesh takes them in that order, so its slowest axis, `data`, is the first to cross islands.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import topologies

from sharding import gpu_targets
from sharding.mesh import AXES, MeshShape
from sharding.topology import Chip, chip_named

# The slices that are sold, by chips (cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}).
_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SLICES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_SLICES_3D += ("8x16x16", "16x16x16")
_SLICES = {
  "v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"),
  "v4": _SLICES_3D,
  "v5e": _SLICES_2D,
  "v5p": _SLICES_3D,
  "v6e": _SLICES_2D,
}
# What compiles for CUDA, without a GPU too.
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# Devices of a chip: the two cores of a v3 are two devices.
_CORES = {"v3": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """`num_islands` equal islands of `torus` chips each; a node of GPUs is a torus of one dimension
  whose switch connects all with all."""

  chip: Chip
  torus: tuple[int, ...]
  num_islands: int = 1

  @property
  def island_devices(self) -> int:
    return math.prod(self.torus) * _CORES.get(self.chip.key, 1)

  @property
  def num_devices(self) -> int:
    return self.num_islands * self.island_devices

  @property
  def num_chips(self) -> int:
    return self.num_islands * math.prod(self.torus)

  @property
  def uncompilable(self) -> str | None:
    """Why nothing can be compiled for it here; None if it can. No such chip is needed for that."""
    if self.chip.platform == "tpu":
      return None
    if self.chip.key not in gpu_targets.TARGETS:
      return f"there is no description of {self.chip.name} for the compiler"
    if not any(importlib.util.find_spec(name) for name in _CUDA_PLUGINS):
      return "install the cuda extra to compile: pip install 'jax[cuda13]'"
    return None

  def __str__(self) -> str:
    if self.chip.platform == "gpu":
      return f"{self.num_chips} x {self.chip.name}"
    slices = f"{self.num_islands} slices of " if self.num_islands > 1 else ""
    return f"{slices}{self.chip.key}:{'x'.join(map(str, self.torus))}"

  def devices(self) -> Sequence[Any]:
    """The devices as the compiler knows them; none of them is here. ValueError without it."""
    if self.uncompilable is not None:
      raise ValueError(f"{self}: {self.uncompilable}")
    if self.chip.platform == "gpu":
      return topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu_targets.TARGETS[self.chip.key],
        # Domains of NVLink x hosts x devices of a host.
        topology=f"1x{self.num_islands}x{self.island_devices}",
      ).devices
    # libtpu reads these when it is loaded. It must not ask a metadata server which machine this is,
    # and must not refuse because another process compiles too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = {}
    if self.chip.key == "v4":
      # Two cores of a chip as one device, as Cloud TPU has them.
      options["chip_config_name"] = "megacore"
    if self.num_islands > 1:
      options["num_slices"] = self.num_islands
    name = f"{self.chip.key}:{'x'.join(map(str, self.torus))}"
    try:
      return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except RuntimeError as error:
      raise ValueError(
        f"topology {name}: {error}. Compiling for TPU needs libtpu: pip install 'jax[tpu]'"
      ) from error

  def islands(self, positions: Iterable[int]) -> int:
    """How many islands the devices at these positions of the mesh lie in."""
    return len({position // self.island_devices for position in positions})

  def links(self, mesh: MeshShape) -> dict[str, float]:
    """How many links a ring over each axis of the mesh has for itself, inside one island.

    Axes are placed on the torus starting with the last, tensor: on dimensions of their own size
    where there are any, else on parts of dimensions. An axis that has a whole dimension counts two
    links if the dimension closes to a ring, and one if it is a line. Where an axis has a part whose
    members are g apart, g rings share the links.
    """
    if self.chip.platform == "gpu":
      return dict.fromkeys(AXES, 1.0)
    left = [*self.torus]
    links = {}
    sizes = dict(zip(AXES, mesh.sizes))
    for axis in reversed(AXES):
      size, found = sizes[axis], 0.0
      exact = [dimension for dimension, rest in enumerate(left) if rest == size]
      for dimension in exact or range(len(left)):
        part = math.gcd(size, left[dimension])
        if part == 1:
          continue
        size //= part
        whole, apart = self.torus[dimension], self.torus[dimension] // left[dimension]
        left[dimension] //= part
        found += 2.0 if part == whole and self._closes(whole) else 1.0 / apart
      # An axis that no dimension divides, such as the two cores of a v3, is connected at least as
      # well.
      links[axis] = found or 1.0
    return links

  def _closes(self, size: int) -> bool:
    """Whether a dimension of this size is a ring; in three dimensions only whole cubes have any."""
    dimensions = self.torus if len(self.torus) == 3 else (size,)
    return all(dimension % self.chip.wraps_at == 0 for dimension in dimensions)


def of_topology(name: str, *, num_slices: int = 1) -> Machine:
  """The machine of "v5e:16x16", "v5p:8x8x8" or "h100:8": eight GPUs, in whole nodes."""
  match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name)
  if match is None:
    raise ValueError(f"topology {name!r} is not CHIP:SIZE, as v5e:16x16, v5p:8x8x8 or h100:8")
  chip = chip_named(match[1])
  if chip.platform == "gpu":
    if "x" in match[2]:
      raise ValueError(f"topology {name!r}: {chip.name} has no torus; h100:16 are 16 in two nodes")
    return of_chips(chip.key, int(match[2]), num_slices=num_slices)
  torus = tuple(int(size) for size in match[2].split("x"))
  if len(torus) != chip.links // 2 or 0 in torus:
    raise ValueError(
      f"topology {name!r}: {chip.name} has a torus of {chip.links // 2} dimensions, each at least "
      f"1; standard are {', '.join(_SLICES[chip.key])}"
    )
  return _checked(Machine(chip=chip, torus=torus, num_islands=num_slices))


def of_chips(key: str, num_chips: int, *, num_slices: int = 1) -> Machine:
  """The machine of `num_chips` chips in all: the standard slice of that size, or nodes of GPUs."""
  chip = chip_named(key)
  if chip.platform == "gpu":
    node = min(num_chips, chip.host_devices)
    if num_chips < 1 or num_chips % node:
      raise ValueError(f"{num_chips} {chip.name} are not whole nodes of {chip.host_devices}")
    if num_slices != 1:
      raise ValueError(f"slices {num_slices}: {chip.name} has none; nodes follow from the chips")
    return _checked(Machine(chip=chip, torus=(node,), num_islands=num_chips // node))
  for written in _SLICES[chip.key]:
    torus = tuple(int(size) for size in written.split("x"))
    if math.prod(torus) * num_slices == num_chips:
      return _checked(Machine(chip=chip, torus=torus, num_islands=num_slices))
  sizes = [math.prod(map(int, written.split("x"))) * num_slices for written in _SLICES[chip.key]]
  raise ValueError(
    f"{num_chips} chips in {num_slices} slice(s) are no standard size of {chip.name}; there are "
    f"{', '.join(map(str, sizes))}"
  )


def larger(machine: Machine) -> Iterator[Machine]:
  """Larger machines of the same chips, up to a thousand chips or so, smallest first."""
  key = machine.chip.key
  if machine.chip.platform == "gpu":
    node = machine.chip.host_devices
    sizes = [node << power for power in range(8)] if machine.chip.dcn_bytes_per_second else [node]
    yield from (of_chips(key, size) for size in sizes if size > machine.num_chips)
    return
  for written in _SLICES[key]:
    torus = tuple(int(size) for size in written.split("x"))
    if math.prod(torus) > math.prod(machine.torus):
      yield Machine(chip=machine.chip, torus=torus, num_islands=machine.num_islands)


def _checked(machine: Machine) -> Machine:
  if machine.num_islands < 1:
    raise ValueError(f"slices {machine.num_islands} must be at least 1")
  if machine.num_islands > 1 and machine.chip.dcn_bytes_per_second is None:
    raise ValueError(
      f"{machine.chip.name}: no source states its network between slices or nodes, so that several "
      "cannot be planned (sharding/topology.py)"
    )
  return machine


def positions(mesh: MeshShape, axes: Iterable[str]) -> np.ndarray:
  """The positions in the mesh of the first group of devices that differ along `axes`."""
  chosen = set(axes)
  indices = np.arange(math.prod(mesh.sizes)).reshape(mesh.sizes)
  return indices[tuple(slice(None) if axis in chosen else 0 for axis in AXES)].ravel()
