"""The time of a training step on a machine: matrix units, HBM, fast links, network.

Each of the four is bytes or FLOPs over what the chip can do (sharding/topology.py). The bound uses
the chip's peaks: a step takes no less than the largest of the four, with all others hidden behind
it. This also gives the MFU ceiling. The expected time uses the shares of the peaks that kernels
reach, and lies half way between the largest and the sum. Elementwise work is counted by the bytes
it moves.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
  """Equal collectives of one step. `bytes` is what one device sends or receives, whichever is
  larger, in all `times`; a group of `members` devices lies in `islands` slices or nodes."""

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

  Inside an island it is a ring over all links of the axes. Between islands each device sends the
  part of the array that is its share within its island. A permutation is one hop over one link.
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


class Executed(NamedTuple):
  """FLOPs of one token with what is computed again. Attention is counted at the keys that a query
  sees, backward as 5 products; its kernel multiplies `visited` times as many."""

  matmul: float  # all but attention's own products
  attention_forward: float
  attention_backward: float
  visited: float = 1.0

  @property
  def total(self) -> float:
    return self.matmul + self.attention_forward + self.attention_backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds of one step on each device, and the model's FLOPs of that step."""

  compute: float
  hbm: float
  ici: float  # NVLink on GPU
  dcn: float
  compute_reached: float  # as `compute`, at the shares of the peak that kernels reach
  hbm_reached: float
  relayout_reached: float  # of copies into whole tiles, which `hbm_reached` leaves out
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
    """What a step is expected to take, by which layouts are compared. Kernels are as fast as they
    are known to be, and the time is half way between all hidden and nothing hidden: gathers of
    weights hide well, all-reduces of activations badly. Copies hide behind nothing."""
    times = (self.compute_reached, self.hbm_reached, self.ici, self.dcn)
    return (max(times) + sum(times)) / 2 + self.relayout_reached

  @property
  def expected_mfu(self) -> float:
    return self.model_flops / (self.expected_seconds * self.peak_flops)

  @property
  def mfu_ceiling(self) -> float:
    return self.model_flops / (self.step_seconds * self.peak_flops)


def roofline(
  *,
  flops: Flops,
  executed: Executed,
  tokens_per_device: float,
  hbm_bytes: float,
  relayout_bytes: float,
  transfers: Iterable[Transfer],
  machine: Machine,
) -> Roofline:
  """`tokens_per_device` are those of a step divided by all devices, whatever they share.
  `relayout_bytes` are those of `hbm_bytes` that copies into whole tiles move."""
  chip = machine.chip
  reached = chip.reached
  transfers = list(transfers)
  relayout = 0.0
  if relayout_bytes:
    assert reached.relayout is not None
    relayout = relayout_bytes / (reached.relayout * chip.hbm_bytes_per_second)
  at_peak = executed.matmul / reached.matmul + executed.visited * (
    executed.attention_forward / reached.attention_forward
    + executed.attention_backward / reached.attention_backward
  )
  return Roofline(
    compute=executed.total * tokens_per_device / chip.peak_flops,
    hbm=hbm_bytes / chip.hbm_bytes_per_second,
    compute_reached=at_peak * tokens_per_device / chip.peak_flops,
    hbm_reached=(hbm_bytes - relayout_bytes) / (reached.hbm * chip.hbm_bytes_per_second),
    relayout_reached=relayout,
    ici=sum(one.link_seconds for one in transfers),
    dcn=sum(one.network_seconds for one in transfers),
    model_flops=flops.train * tokens_per_device,
    peak_flops=chip.peak_flops,
  )
