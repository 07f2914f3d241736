"""Layouts of a run on a machine: all that are possible, ranked by the models, in seconds.

A layout changes no result, only where arrays lie and when they are made: the mesh, the ZeRO stage,
what the backward pass computes again, and the number of microbatches.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from models.flops import flops_per_token
from sharding.machine import Machine
from sharding.mesh import MeshShape
from train import program as programs
from train.config import Run
from train.planning.footprint import footprint
from train.planning.layouts import REMATS, STAGES, Layout, layout_of
from train.planning.roofline import Roofline, roofline
from train.planning.traffic import collectives, executed_flops, hbm_bytes

# The memory model falls short by less than this (docs/plans.jsonl): what leaves more fits for sure.
SAFE_MARGIN = 0.15
# Shorter rows lie whole on a device; a shard of a longer one has at least so many tokens.
_LONG_ROW = 32_768
_SHARD_TOKENS = 4096
# A longer row of tensor shards is never worth its all-reduces of activations.
_MAX_TENSOR = 16


class Candidate(NamedTuple):
  """A layout as the models see it."""

  layout: Layout
  bytes: float  # on each device
  margin: float  # the share of memory that is left
  roofline: Roofline

  @property
  def rank(self) -> tuple[bool, bool, float]:
    """Smaller is better: what fits for sure, then what fits by the model, then the step; the bytes
    of what does not fit."""
    is_too_large = self.margin < 0
    rest = self.bytes if is_too_large else self.roofline.expected_seconds
    return self.margin < SAFE_MARGIN, is_too_large, rest


def search(run: Run, machine: Machine) -> list[Candidate]:
  """Every layout that divides the run, best first; those that do not fit are at the end."""
  found = [
    candidate
    for layout in layouts(run, machine)
    if (candidate := evaluate(run, layout, machine)) is not None
  ]
  return sorted(found, key=lambda one: one.rank)


def check_row_shards(run: Run, machine: Machine) -> None:
  """Raises where a search has no layout because of the mesh axis sequence that the run asks for."""
  shards = _row_shards(run, machine)
  if len(shards) > 1:
    return
  if machine.num_devices % shards[0]:
    raise ValueError(
      f"search: mesh.sequence {shards[0]} does not divide the {machine.num_devices} devices of "
      f"{machine}; leave it out, or set it to a number that does"
    )
  programs.check_rows_split(run, shards[0])


def layouts(run: Run, machine: Machine) -> Iterator[Layout]:
  """Every layout of so many devices, whether or not it divides the run."""
  rows = run.batch_size
  shards = _row_shards(run, machine)
  for mesh in (mesh for number in shards for mesh in _meshes(machine, sequence=number)):
    shards = mesh.data * mesh.fsdp
    if rows % shards:
      continue
    # Without fsdp there is nothing that a ZeRO stage could split.
    stages = STAGES if mesh.fsdp > 1 else STAGES[:1]
    parts = [number for number in _divisors(rows // shards) if number <= 64]
    for stage, remat, number in itertools.product(stages, REMATS, parts):
      yield Layout(mesh=mesh, zero_stage=stage, remat=remat, num_microbatches=number)


def evaluate(run: Run, layout: Layout, machine: Machine) -> Candidate | None:
  """The layout by the models; None where it does not divide the run."""
  planned = layout.of(run)
  platform = machine.chip.platform
  try:
    programs.check_fits(planned, layout.mesh.abstract)
    held = footprint(planned, layout.mesh, platform=platform)
  except ValueError:
    return None
  flops = flops_per_token(run.model, run.data.row_length)
  moved = hbm_bytes(planned, layout.mesh, chip=machine.chip)
  times = roofline(
    flops=flops,
    executed=executed_flops(planned, platform=platform),
    tokens_per_device=run.batch_size * run.data.row_length / machine.num_devices,
    hbm_bytes=moved.total,
    relayout_bytes=moved.relayouts,
    transfers=collectives(planned, layout.mesh, machine),
    machine=machine,
  )
  return Candidate(layout, held.total, 1.0 - held.total / machine.chip.hbm_bytes, times)


def advice(run: Run, machine: Machine) -> list[tuple[str, Candidate]]:
  """Changes of one setting that make a run fit or, if it fits, at least 3 % faster: what to set,
  and the candidate; best first."""
  now = layout_of(run, machine.num_devices)
  before = evaluate(run, now, machine)
  found = []
  for layout in layouts(run, machine):
    changed = _difference(now, layout)
    if len(changed) != 1 or (after := evaluate(run, layout, machine)) is None:
      continue
    is_better = before is None or before.margin < 0
    if before is not None:
      is_better |= after.roofline.expected_seconds < 0.97 * before.roofline.expected_seconds
    if after.margin >= SAFE_MARGIN and is_better:
      found.append((changed[0], after))
  found.sort(key=lambda one: one[1].rank)
  return found[:3]


def _difference(now: Layout, then: Layout) -> list[str]:
  """The settings in which `then` differs, in words."""
  found = []
  if then.mesh != now.mesh:
    axes = ("data", "fsdp", "sequence", "tensor")
    found.append("mesh " + " x ".join(f"{a} {getattr(then.mesh, a)}" for a in axes))
  for name in ("zero_stage", "remat", "num_microbatches"):
    if getattr(then, name) != getattr(now, name):
      found.append(f"{name} {getattr(then, name)}")
  return found


def _row_shards(run: Run, machine: Machine) -> list[int]:
  """Over how many devices a row may lie: any number for long rows, otherwise as the run says."""
  length = run.data.row_length
  if length < _LONG_ROW:
    return [max(1, run.mesh.sequence)]
  numbers = _divisors(machine.island_devices)
  return [one for one in numbers if length % one == 0 and one * _SHARD_TOKENS <= length]


def _meshes(machine: Machine, *, sequence: int) -> Iterator[MeshShape]:
  """Every mesh of the machine's devices with that size of sequence; slices lie over data."""
  if machine.num_devices % sequence:
    return
  devices = machine.num_devices // sequence
  islands = machine.num_islands if machine.chip.platform == "tpu" else 1
  for tensor in _divisors(devices):
    if tensor > min(_MAX_TENSOR, machine.island_devices):
      continue
    for data in _divisors(devices // tensor):
      if data % islands == 0:
        fsdp = devices // tensor // data
        yield MeshShape(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)


def _divisors(number: int) -> list[int]:
  return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
