"""What a compiled program sends between devices, read from its text: kind, bytes, axes, how often.

`read(compiled.as_text(), mesh)` understands the forms that XLA writes: asynchronous pairs (counted
once, at their start), chains of fusions (TPU; counted once), combined collectives with tuple
shapes, and groups of devices as a list {{0,1},{2,3}}, as a reshape [4,2]<=[2,4]T(1,0), or as axes
of XLA's own mesh. A form that it does not know is an error, never skipped.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from sharding import program_text
from sharding.program_text import Instruction, arrays_of, size_of

Groups = tuple[tuple[int, ...], ...]

_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective of a program.

  `arrays` are what leaves one device or arrives there, whichever is larger, as (dtype, shape): the
  result of an all-gather, the operand of a reduce-scatter. `bytes` is their size. `times` is how
  often it runs in one call of the program, None in a loop whose trip count the compiler does not
  know. `groups` are positions in mesh.devices.flat; of a permutation, its (source, target) pairs.
  `axes` are the mesh axes along which the members of a group differ. `op_name` is the path of JAX's
  names, with named scopes, and with "transpose" for the backward pass.
  """

  kind: str
  name: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  bytes: int
  groups: Groups
  axes: tuple[str, ...]
  times: int | None
  op_name: str


def read(text: str, mesh: Mesh) -> list[Collective]:
  """Every collective of a compiled program for `mesh`, in the order of the text."""
  computations, entry = program_text.computations_of(text)
  times = program_text.times_of(computations, entry)
  fused = program_text.fused(computations)
  found, chains = [], set()
  for computation, instructions in computations.items():
    for instruction in instructions.values() if computation in times else ():
      if started(instruction) is not None and _chain(instruction) not in chains:
        chains |= {_chain(instruction)} - {None}
        kind = _kind(instruction, instructions, is_fused=computation in fused)
        found.append(_collective(kind, instruction, instructions, times[computation], mesh))
  return found


def summary(
  collectives: Iterable[Collective],
) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
  """How often and how many bytes in all, by (kind, axes); loops of unknown length count once."""
  totals: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
  for one in collectives:
    times = 1 if one.times is None else one.times
    number, size = totals.get((one.kind, one.axes), (0, 0))
    totals[one.kind, one.axes] = (number + times, size + times * one.bytes)
  return totals


def axes_of(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which members of a group differ; no groups at all means all devices."""
  shape = mesh.devices.shape
  if not groups:
    groups = (tuple(range(mesh.size)),)
  differ = np.zeros(len(shape), bool)
  for group in groups:
    coordinates = np.stack(np.unravel_index(np.array(group), shape))
    differ |= (coordinates != coordinates[:, :1]).any(axis=1)
  return tuple(axis for axis, differs in zip(mesh.axis_names, differ) if differs)


def started(instruction: Instruction) -> str | None:
  """The kind of a collective, or of an asynchronous one that starts here; None otherwise."""
  kind = instruction.opcode.removesuffix("-start")
  return kind if kind in _KINDS else None


def _chain(instruction: Instruction) -> tuple[str, ...] | None:
  """The name shared by the parts of one collective that runs through several fusions (TPU)."""
  chain = re.search(r'channel_id=(\d+),.*chain_id="(\d+)"', instruction.rest)
  return chain.groups() if chain else None


def _collective(
  kind: str,
  instruction: Instruction,
  instructions: dict[str, Instruction],
  times: int | None,
  mesh: Mesh,
) -> Collective:
  taken = [array for name in instruction.operands for array in arrays_of(instructions[name].shape)]
  given = arrays_of(instruction.shape)
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    # (operands, results, ...): the results are as many as the operands.
    given = given[len(taken) : 2 * len(taken)]
  arrays = max(taken, given, key=size_of)
  groups = _groups(instruction.rest, mesh.size)
  return Collective(
    kind=kind,
    name=instruction.name,
    arrays=tuple(arrays),
    bytes=size_of(arrays),
    groups=groups,
    axes=axes_of(groups, mesh),
    times=times,
    op_name=instruction.op_name,
  )


def _kind(instruction: Instruction, instructions: dict[str, Instruction], *, is_fused: bool) -> str:
  """Its kind; an all-reduce of which a fusion keeps only a slice is a reduce-scatter (on TPU)."""
  kind = started(instruction)
  assert kind is not None
  last = list(instructions.values())[-1]
  if is_fused and kind == "all-reduce" and last.opcode == "dynamic-slice":
    return "reduce-scatter"
  return kind


def _groups(written: str, num_devices: int) -> Groups:
  """The groups of an instruction's attributes, or the pairs of a permutation."""
  if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", written):
    return _listed(pairs[1])
  attribute = re.search(r"replica_groups=(.*)", written)
  if attribute is None:
    return (tuple(range(num_devices)),)
  groups = attribute[1]
  if listed := re.match(r"\{((?:\{[\d,]*\},?)*)\}", groups):
    return _listed(listed[1]) or (tuple(range(num_devices)),)
  if reshaped := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
    return _rows(_iota(reshaped[2], reshaped[3]).reshape(_numbers(reshaped[1])))
  if meshed := re.match(
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", groups
  ):
    axes = re.findall(r"'?([\w.\-]+)'?=(\d+)", meshed[1])
    sizes = [int(size) for _, size in axes]
    devices = _iota(meshed[2], meshed[3]) if meshed[2] else np.arange(math.prod(sizes))
    return _along([name for name, _ in axes], devices.reshape(sizes), meshed[4])
  raise ValueError(f"unknown form of replica groups: {groups[:120]!r}")


def _along(names: list[str], devices: np.ndarray, written: str) -> Groups:
  """Groups along axes of XLA's mesh, written 'a','b', or 'a':(p)s for a part of an axis.

  The part (p)s of an axis of size n is the middle one of n seen as p x s x n / (p s).
  """
  coordinates = list(np.indices(devices.shape))
  for name, before, part in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", written):
    index = names.index(name)
    size = int(part or devices.shape[index])
    stride = devices.shape[index] // (int(before or 1) * size)
    # Devices that differ only here get the same coordinates, and so fall into one group.
    coordinates[index] = coordinates[index] - coordinates[index] // stride % size * stride
  keys = np.ravel_multi_index(coordinates, devices.shape)
  return tuple(tuple(int(device) for device in devices[keys == key]) for key in np.unique(keys))


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
  shape = _numbers(sizes)
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices.transpose(_numbers(permutation)) if permutation else devices


def _numbers(written: str) -> list[int]:
  return [int(number) for number in written.split(",") if number]


def _listed(written: str) -> Groups:
  return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]*)\}", written))


def _rows(groups: np.ndarray) -> Groups:
  return tuple(tuple(int(device) for device in group) for group in groups)
