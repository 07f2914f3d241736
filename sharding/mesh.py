"""The device mesh: data x fsdp x sequence x tensor, in this order, slowest links first."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
  """Devices along each axis of the mesh; -1 on one axis takes all devices that the others leave.

  data      replicas: each has the whole state (of its tensor shard), they exchange gradients
  fsdp      ZeRO: the state is split over it as the rules say; batches are split over data x fsdp
  sequence  the time of every row, in equal parts; the state is the same on all of them
  tensor    Megatron: heads, MLP, recurrence and vocabulary are split over it
  """

  recorded_as: ClassVar[str] = "sharding.mesh.MeshShape"

  data: int = 1
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1

  def __post_init__(self):
    for axis, size in zip(AXES, self.sizes):
      if size < 1 and size != -1:
        raise ValueError(f"MeshShape: {axis} {size} must be at least 1, or -1 for the rest")
    if self.sizes.count(-1) > 1:
      raise ValueError(f"MeshShape: {self} has more than one -1; only one axis can take the rest")

  @property
  def sizes(self) -> tuple[int, ...]:
    """In the order of the mesh's axes."""
    return (self.data, self.fsdp, self.sequence, self.tensor)

  def resolved(self, num_devices: int) -> "MeshShape":
    """The shape with its -1 replaced; raises unless it uses exactly `num_devices` devices."""
    fixed = math.prod(size for size in self.sizes if size != -1)
    if num_devices % fixed or (-1 not in self.sizes and fixed != num_devices):
      rule = "does not divide" if -1 in self.sizes else "is not"
      raise ValueError(
        f"MeshShape: {_product(self.sizes)} = {fixed} {rule} the number of devices {num_devices}; "
        "change an axis, or set one to -1 to take the rest"
      )
    rest = num_devices // fixed
    sizes = [rest if size == -1 else size for size in self.sizes]
    return MeshShape(**dict(zip(AXES, sizes)))

  @property
  def abstract(self) -> jax.sharding.AbstractMesh:
    """A mesh of this shape without devices: enough to ask how large its axes are."""
    return jax.sharding.AbstractMesh(self.sizes, AXES)


def make_mesh(shape: MeshShape, *, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """A mesh with Auto axes over `devices` (all, if None), neighbours in hardware close in the mesh.

  Slices of a multi-slice job lie over `data`; a `data` that they do not divide is an error.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = shape.resolved(len(devices))
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  check_slices(shape, num_slices)
  if num_slices > 1:
    within = (shape.data // num_slices, *shape.sizes[1:])
    array = mesh_utils.create_hybrid_device_mesh(
      within, (num_slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  elif devices[0].platform == "tpu" and _is_whole_torus(devices):
    # Split: a torus of 16 x 16 has no axis of 4 and none of 64 to give to fsdp 4 x sequence 64.
    array = mesh_utils.create_device_mesh(shape.sizes, devices, allow_split_physical_axes=True)
  else:
    # In the order given: GPUs and simulated devices are numbered host by host, so that tensor, the
    # last axis, stays within a host; a subset of a pod has no torus to fit.
    array = np.array(devices).reshape(shape.sizes)
  return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> MeshShape:
  """The shape that "data=2,fsdp=-1,tensor=4" describes; axes that it does not name are 1."""
  sizes: dict[str, int] = {}
  for part in text.split(","):
    axis, equals, size = (word.strip() for word in part.partition("="))
    if not equals or not re.fullmatch(r"-?\d+", size):
      raise ValueError(f"mesh {text!r}: {part!r} is not AXIS=SIZE, as in data=2,fsdp=-1,tensor=4")
    if axis not in AXES:
      raise ValueError(f"mesh {text!r}: axis {axis!r} is none of {', '.join(AXES)}")
    if axis in sizes:
      raise ValueError(f"mesh {text!r}: axis {axis} is given twice")
    sizes[axis] = int(size)
  return MeshShape(**sizes)


def check_slices(shape: MeshShape, num_slices: int) -> None:
  """Raises unless slices lie over `data`, the one axis that needs little of the network between
  them."""
  if shape.data % num_slices:
    raise ValueError(
      f"MeshShape: data {shape.data} is not divisible by the number of slices {num_slices}; slices "
      f"lie over data: set it to {num_slices} or a multiple"
    )


class RowShare(NamedTuple):
  """The rows of a batch that one process reads: part `index` of `count` equal ones.

  `shards` are the positions on data x fsdp, in order, that hold these rows.
  """

  index: int
  count: int
  shards: tuple[int, ...]


def row_share(devices: np.ndarray, process_index: int) -> RowShare:
  """What a process has to read for its devices of a mesh; `devices` is mesh.devices.

  Processes that hold different times or channels of the same rows get the same share: each reads
  the whole rows. ValueError where the rows of two processes overlap without being the same.
  """
  data, fsdp = devices.shape[:2]
  shards_of: dict[int, tuple[int, ...]] = {}
  for shard, row in enumerate(devices.reshape(data * fsdp, -1)):
    for process in {device.process_index for device in row}:
      shards_of[process] = (*shards_of.get(process, ()), shard)
  shares = sorted(set(shards_of.values()))
  if sum(map(len, shares)) != data * fsdp or len(set(map(len, shares))) > 1:
    raise ValueError(
      f"mesh {_product(devices.shape)}: the rows of processes are neither the same nor different "
      f"ones, nor equally many: by process, their places on data x fsdp are {shards_of}; make "
      "sequence x tensor a divisor or a multiple of the devices of a process"
    )
  mine = shards_of[process_index]
  return RowShare(shares.index(mine), len(shares), mine)


def _is_whole_torus(devices: Sequence[Any]) -> bool:
  """Whether the devices fill a box of the torus, as those of a slice do."""
  coordinates = np.array([(*device.coords, device.core_on_chip) for device in devices])
  return math.prod(np.ptp(coordinates, axis=0) + 1) == len(devices)


def _product(sizes: tuple[int, ...]) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes) if size != -1)
