"""What a compiled program sends between devices, read from its text: kind, bytes, axes, how often.

`read(compiled.as_text(), mesh)` understands the forms that XLA writes: asynchronous pairs (counted
once, at their start), chains of fusions (TPU; counted once), combined collectives with tuple
shapes, and groups of devices as a list {{0,1},{2,3}}, as a reshape [4,2]<=[2,4]T(1,0), or as axes
of XLA's own mesh. A form that it does not know is an error, never skipped.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jax.sharding import Mesh

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
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s?([a-z][a-z\-]*)\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective of a program.

  `arrays` are what leaves one device or arrives there, whichever is larger, as (dtype, shape): what
  an all-gather gives, what a reduce-scatter takes. `bytes` is their size, `times` how often it runs
  in one call of the program, None in a loop whose trip count the compiler does not know. `groups`
  are positions in mesh.devices.flat, for a permutation its (source, target) pairs. `axes` are the
  mesh axes along which the members of a group differ. `op_name` is the path of JAX's names, with
  named scopes and "transpose" for the backward pass.
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
  computations, entry = _computations(text)
  times = _times(computations, entry)
  fused = {
    called
    for instructions in computations.values()
    for instruction in instructions.values()
    if instruction.opcode == "fusion"
    for called, _ in _calls(instruction, computations)
  }
  found, chains = [], set()
  for computation, instructions in computations.items():
    for instruction in instructions.values() if computation in times else ():
      if instruction.kind is not None and instruction.chain not in chains:
        chains |= {instruction.chain} - {None}
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


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str  # as written
  opcode: str
  rest: str  # operands and attributes, as written

  @property
  def kind(self) -> str | None:
    """The kind of a collective, also of one that starts here; None for all else."""
    kind = self.opcode.removesuffix("-start")
    return kind if kind in _KINDS else None

  @property
  def chain(self) -> tuple[str, ...] | None:
    """What the links of one collective have in common that runs through several fusions (TPU)."""
    chain = re.search(r'channel_id=(\d+),.*chain_id="(\d+)"', self.rest)
    return chain.groups() if chain else None

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  """The instructions of each computation by their names, and the name of the entry."""
  computations: dict[str, dict[str, _Instruction]] = {}
  current: dict[str, _Instruction] = {}
  entry = None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif match := _INSTRUCTION.match(line):
      current[match[1]] = _instruction(match[1], match[2])
  if entry is None:
    raise ValueError("no ENTRY computation: this is not the text of a compiled program")
  return computations, entry


def _instruction(name: str, written: str) -> _Instruction:
  # A tuple's shape holds spaces, comments and parentheses (in layouts) of its own.
  end = _closing(written[1:]) + 2 if written.startswith("(") else 0
  opcode = _OPCODE.search(written, end)
  assert opcode is not None, f"no opcode in {written}"
  return _Instruction(name, written[: opcode.start()], opcode[1], written[opcode.end() :])


def _closing(written: str) -> int:
  """Where the parenthesis that was open before `written` closes."""
  depth = 1
  for index, letter in enumerate(written):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return index
  raise ValueError(f"parentheses do not close in {written[:100]!r}")


def _times(computations: dict[str, dict[str, _Instruction]], entry: str) -> dict[str, int | None]:
  """How often each computation runs; None if that depends on data."""
  times: dict[str, int | None] = {entry: 1}
  # Callers come after what they call in the text, so that one pass backwards sees all callers.
  for name in reversed(list(computations)):
    if name not in times:
      continue
    for instruction in computations[name].values():
      for called, trips in _calls(instruction, computations):
        per_call = times[name]
        calls = None if per_call is None or trips is None else per_call * trips
        before = times.get(called, 0)
        times[called] = None if before is None or calls is None else before + calls
  return times


def _calls(
  instruction: _Instruction, computations: dict[str, dict[str, _Instruction]]
) -> list[tuple[str, int | None]]:
  """The computations that an instruction runs, and how often."""
  # These name again what their start runs.
  if instruction.opcode in ("async-update", "async-done"):
    return []
  trips: int | None = 1
  if instruction.opcode == "while":
    trips = _trips(instruction, computations)
  called = _CALLED.findall(instruction.rest)
  for branches in _BRANCHES.findall(instruction.rest):
    called += re.findall(r"%?([\w.\-]+)", branches)
  return [(name, trips) for name in called]


def _trips(
  instruction: _Instruction, computations: dict[str, dict[str, _Instruction]]
) -> int | None:
  """The trip count of a while loop: as annotated, or n of a condition that is `i < n`.

  Loops of jax.lax.scan count from 0 by 1; None where the condition says something else.
  """
  if known := _TRIP_COUNT.search(instruction.rest):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
  assert condition is not None, f"no condition in {instruction.rest[:200]}"
  instructions = computations[condition[1]]
  last = list(instructions.values())[-1]
  if last.opcode != "compare" or "direction=LT" not in last.rest:
    return None
  index, bound = (instructions[name] for name in last.operands)
  is_counter = index.opcode == "get-tuple-element" and index.shape.startswith("s32[]")
  constant = re.match(r"(\d+)\)", bound.rest) if bound.opcode == "constant" else None
  return int(constant[1]) if is_counter and constant else None


def _collective(
  kind: str,
  instruction: _Instruction,
  instructions: dict[str, _Instruction],
  times: int | None,
  mesh: Mesh,
) -> Collective:
  taken = [array for name in instruction.operands for array in _arrays(instructions[name].shape)]
  given = _arrays(instruction.shape)
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    # (operands, results, ...): the results are as many as the operands.
    given = given[len(taken) : 2 * len(taken)]
  arrays = max(taken, given, key=_size)
  groups = _groups(instruction.rest, mesh.size)
  op_name = re.search(r'op_name="([^"]*)"', instruction.rest)
  return Collective(
    kind=kind,
    name=instruction.name,
    arrays=tuple(arrays),
    bytes=_size(arrays),
    groups=groups,
    axes=axes_of(groups, mesh),
    times=times,
    op_name=op_name[1] if op_name else "",
  )


def _kind(
  instruction: _Instruction, instructions: dict[str, _Instruction], *, is_fused: bool
) -> str:
  """As written, but an all-reduce of which a fusion keeps a slice is a reduce-scatter (on TPU)."""
  assert instruction.kind is not None
  last = list(instructions.values())[-1]
  if is_fused and instruction.kind == "all-reduce" and last.opcode == "dynamic-slice":
    return "reduce-scatter"
  return instruction.kind


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """The arrays of a shape as written, tuples flattened; layouts and comments are left out."""
  return [
    (dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _SHAPE.findall(shape)
  ]


def _size(arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
  return sum(math.ceil(_bits(dtype) * math.prod(shape) / 8) for dtype, shape in arrays)


def _bits(dtype: str) -> int:
  if dtype in ("pred", "token"):
    return 8 if dtype == "pred" else 0
  bits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
  if bits is None:
    raise ValueError(f"unknown dtype {dtype!r} in a compiled program")
  return int(bits[1])


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
