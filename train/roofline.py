"""The least time of a training step on a machine: matrix units, HBM, fast links, network.

Each of the four is bytes or FLOPs over what the chip can do at most (sharding/topology.py). A step
takes no less than the largest of them, all others hidden behind it; and no more than their sum,
nothing hidden, as far as each runs at its peak. Elementwise work is counted by the bytes it moves.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from models.flops import Flops
from sharding.machine import Machine
from sharding.mesh import MeshShape

# How often an array of S bytes passes a device's links, in units of S (n - 1) / n, on a ring of n.
_PASSES = {
  "all-gather": 1.0,
  "reduce-scatter": 1.0,
  "all-reduce": 2.0,
  "all-to-all": 1.0,
  "ragged-all-to-all": 1.0,
  "collective-broadcast": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
  """Equal collectives of one step. `bytes` is what one device gives or gets, whichever is larger,
  over all `times`; `islands` is how many slices or nodes a group of `members` devices lies in."""

  kind: str
  axes: tuple[str, ...]
  times: int
  bytes: float
  members: int
  islands: int
  link_seconds: float
  network_seconds: float

  @property
  def crosses(self) -> bool:
    """Whether it crosses slices (TPU) or nodes (GPU)."""
    return self.islands > 1


def transfer(
  kind: str,
  axes: Iterable[str],
  group: Sequence[int],
  *,
  times: int,
  num_bytes: float,
  machine: Machine,
  mesh: MeshShape,
) -> Transfer:
  """The cost of collectives among the devices at positions `group` of the mesh.

  Inside an island a ring over all links of the axes; between islands each device brings the part
  of the array that it is left with when its island has shared the work out. A permutation is one
  hop over one link.
  """
  axes = tuple(axes)
  members, islands = len(group), machine.islands(group)
  chip = machine.chip
  inside = members / islands
  if kind == "collective-permute":
    link, network = num_bytes, num_bytes if islands > 1 else 0.0
    links = 1.0
  else:
    passes = _PASSES[kind]
    link = passes * num_bytes * (inside - 1) / inside
    network = passes * num_bytes / inside * (islands - 1) / islands
    per_axis = machine.links(mesh)
    links = sum(per_axis[axis] for axis in axes) or 1.0
    # A switch has one way in, whatever the axes.
    links = min(links, float(chip.links))
  assert network == 0 or chip.dcn_bytes_per_second is not None
  return Transfer(
    kind=kind,
    axes=axes,
    times=times,
    bytes=num_bytes,
    members=members,
    islands=islands,
    link_seconds=link / (links * chip.link_bytes_per_second),
    network_seconds=network / chip.dcn_bytes_per_second if chip.dcn_bytes_per_second else 0.0,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds of one step on each device, and the model's FLOPs that it is worth."""

  compute: float
  hbm: float
  ici: float  # NVLink on GPU
  dcn: float
  model_flops: float  # of one step and device, nothing recomputed
  peak_flops: float

  @property
  def times(self) -> dict[str, float]:
    return {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}

  @property
  def bound(self) -> str:
    """What takes longest."""
    return max(self.times, key=lambda name: self.times[name])

  @property
  def step_seconds(self) -> float:
    """The least a step can take: everything hidden behind what takes longest."""
    return max(self.times.values())

  @property
  def serial_seconds(self) -> float:
    """Nothing hidden behind anything."""
    return sum(self.times.values())

  @property
  def expected_seconds(self) -> float:
    """Half way between the two: what layouts are compared by. Of what is sent, gathers of weights
    hide well and all-reduces of activations badly."""
    return (self.step_seconds + self.serial_seconds) / 2

  @property
  def mfu_ceiling(self) -> float:
    return self.model_flops / (self.step_seconds * self.peak_flops)


def roofline(
  *,
  flops: Flops,
  executed_per_token: float,
  tokens_per_device: float,
  hbm_bytes: float,
  transfers: Iterable[Transfer],
  machine: Machine,
) -> Roofline:
  """`tokens_per_device` are those of a step divided by all devices, whatever they share."""
  chip = machine.chip
  transfers = list(transfers)
  return Roofline(
    compute=executed_per_token * tokens_per_device / chip.peak_flops,
    hbm=hbm_bytes / chip.hbm_bytes_per_second,
    ici=sum(one.link_seconds for one in transfers),
    dcn=sum(one.network_seconds for one in transfers),
    model_flops=flops.train * tokens_per_device,
    peak_flops=chip.peak_flops,
  )
