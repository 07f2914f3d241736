"""What each operation of a compiled program computes and moves: FLOPs, bytes, cycles.

`operations(compiled.as_text())` lists what a device runs one after another; a fusion is one
operation.

FLOPs are those of matrix products. On TPU the compiler writes them as convolutions, with batches as
dilated windows: only multiplications with an element count, not those with padding. Bytes are what
an operation reads and writes in the device's large memory. Arrays in another memory (VMEM, S(1)) do
not count, tiles are rounded up, and where a fusion reads or writes a slice of an array, only the
slice counts. A collective that runs beside other operations (on TPU it passes through their
fusions) is counted where it starts. Cycles are the compiler's own estimate, which a TPU program has
for everything except custom calls.
"""

import dataclasses
import math
import re

import numpy as np

from sharding import collectives, program_text
from sharding.program_text import Computations, Instruction

_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](?:\{([^}]*)\})?")
# These move nothing, or only name what was counted at their start.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "async-update",
)
_NOTES = re.compile(r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound)"')
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """One operation; all numbers are of one run of it, and it runs `times` in one call of the
  program. `kernel` is the name of a custom kernel, whose FLOPs are not known here. `sends`: it is a
  collective, and computes only the sums of one."""

  name: str
  op_name: str  # the path of JAX's names
  times: int
  flops: float
  bytes: float
  cycles: int | None
  kernel: str | None
  sends: bool


def operations(text: str) -> list[Operation]:
  """Every operation that computes or moves anything; ValueError for a loop of unknown length."""
  computations, entry = program_text.computations_of(text)
  times = program_text.times_of(computations, entry)
  inside = program_text.fused(computations)
  found = []
  for name, instructions in computations.items():
    if name not in times or name in inside:
      continue
    for one in instructions.values():
      if one.opcode in _FREE or one.opcode.endswith("-done") or _is_note(one):
        continue
      runs = times[name]
      if runs is None:
        raise ValueError(f"program_cost: how often {one.name} runs depends on data")
      cycles = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
      found.append(
        Operation(
          name=one.name,
          op_name=one.op_name,
          times=runs,
          flops=_flops(one, instructions, computations),
          bytes=_bytes(one, instructions, computations),
          cycles=int(cycles[1]) if cycles else None,
          kernel=_kernel(one),
          sends=_sends(one, computations),
        )
      )
  return found


def _kernel(one: Instruction) -> str | None:
  """The name of a custom kernel: on TPU the instruction's, on GPU one in JAX's path of names."""
  if 'custom_call_target="tpu_custom_call"' in one.rest:
    return re.sub(r"[.\d]+$", "", one.name)
  if 'custom_call_target="__gpu$xla.gpu.triton"' in one.rest:
    return one.op_name.split("/")[-2]
  return None


def _sends(one: Instruction, computations: Computations) -> bool:
  if one.opcode not in program_text.FUSIONS:
    return collectives.started(one) is not None
  # The start of one that goes on beside others, or a reduce-scatter, which TPUs have as a fusion.
  inner = list(computations[_called(one)].values())
  starts = 'custom_call_target="AsyncCollectiveStart"' in inner[-1].rest
  return starts or _called(one).startswith("all-reduce-scatter")


def _is_note(one: Instruction) -> bool:
  """Whether it is a custom call that only tells the compiler something."""
  return one.opcode == "custom-call" and re.search(_NOTES, one.rest) is not None


def _flops(
  one: Instruction, instructions: dict[str, Instruction], computations: Computations
) -> float:
  if one.opcode in program_text.FUSIONS:
    called = computations[_called(one)]
    return sum(_flops(inner, called, computations) for inner in called.values())
  match one.opcode:
    case "convolution":
      return _convolution(one, instructions)
    case "dot":
      left, out = _shape(instructions[one.operands[0]]), _shape(one)
      contracted = _numbers(one.rest, "lhs_contracting_dims")
      return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
  return 0.0


def _convolution(one: Instruction, instructions: dict[str, Instruction]) -> float:
  """Two for every multiplication of two elements; those with padding do not count."""
  left, right = (_shape(instructions[name]) for name in one.operands[:2])
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
  assert labels is not None, f"no dim_labels in {one.rest[:200]}"
  sizes = [
    dict(zip(label, shape)) for label, shape in zip(labels.groups(), (left, right, _shape(one)))
  ]
  products = sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
  for axis, label in enumerate(sorted(set(labels[2]) - {"i", "o"})):
    products *= _meetings(one.rest, axis, sizes[0][label], sizes[2][label])
  groups = re.search(r"batch_group_count=(\d+)", one.rest)
  return 2.0 * products / (int(groups[1]) if groups else 1)


def _meetings(written: str, axis: int, size: int, out: int) -> int:
  """How many pairs (result, place in the window) of one window dimension meet an element."""

  def setting(name: str, default: str) -> str:
    found = re.search(rf"window=\{{[^}}]*\b{name}=([\d_x\-]+)", written)
    return found[1].split("x")[axis] if found else default

  before = int(setting("pad", "0_0").rsplit("_", 1)[0])
  window, stride = int(setting("size", "1")), int(setting("stride", "1"))
  left, right = int(setting("lhs_dilate", "1")), int(setting("rhs_dilate", "1"))
  place = np.arange(out)[:, None] * stride - before + np.arange(window)[None] * right
  return int(np.sum((place >= 0) & (place <= (size - 1) * left) & (place % left == 0)))


def _bytes(
  one: Instruction, instructions: dict[str, Instruction], computations: Computations
) -> float:
  if one.opcode.endswith("-start") and one.opcode not in program_text.FUSIONS:
    # A tuple of what is read and what is written.
    return memory_bytes(one.shape)
  if one.opcode in _SLICES:
    return 2 * memory_bytes(one.shape)
  if one.opcode == "dynamic-update-slice":
    return 2 * memory_bytes(instructions[one.operands[1]].shape)
  if one.opcode not in program_text.FUSIONS:
    read = sum(memory_bytes(instructions[name].shape) for name in set(one.operands))
    return read + memory_bytes(one.shape)
  inner = computations[_called(one)]
  read = sum(_read(item, inner, computations) for item in _parameters(inner).values())
  return read + _written(list(inner.values())[-1], inner)


def _parameters(inner: dict[str, Instruction]) -> dict[int, Instruction]:
  """The parameters of a computation by their number."""
  return {
    int(item.rest.partition(")")[0]): item for item in inner.values() if item.opcode == "parameter"
  }


def _read(
  parameter: Instruction, inner: dict[str, Instruction], computations: Computations
) -> float:
  """Bytes that a fusion reads of one of its operands."""
  whole = memory_bytes(parameter.shape)
  read = 0.0
  for user, place in _users(parameter, inner) if whole else ():
    match user.opcode:
      case "dynamic-slice" | "slice" | "gather":
        read += _filled(user.shape)
      case "dynamic-update-slice" if place == 0:
        pass
      case "tuple":
        pass  # handed on as it is
      case _ if _is_under_way(user):
        pass
      case "fusion":
        called = computations[_called(user)]
        read += _read(_parameters(called)[place], called, computations)
      case _:
        return whole
  return min(read, whole)


def _users(one: Instruction, inner: dict[str, Instruction]) -> list[tuple[Instruction, int]]:
  """Its users, and as which operand; instructions that only reshape it are looked through."""
  found = []
  for user in inner.values():
    operands = user.operands if user.opcode not in ("parameter", "constant") else []
    if one.name in operands:
      if user.opcode == "bitcast":
        found += _users(user, inner)
      else:
        found.append((user, operands.index(one.name)))
  return found


def _written(root: Instruction, inner: dict[str, Instruction]) -> float:
  """Bytes that a fusion writes: of what it updates in place, the update."""
  if root.opcode == "parameter" or _is_under_way(root):
    return 0.0
  if root.opcode == "tuple":
    return sum(_written(inner[name], inner) for name in root.operands)
  if root.opcode == "bitcast":
    source = inner[root.operands[0]]
    return (
      _written(source, inner)
      if source.opcode == "dynamic-update-slice"
      else memory_bytes(root.shape)
    )
  if root.opcode == "dynamic-update-slice":
    return float(_filled(inner[root.operands[1]].shape)) if memory_bytes(root.shape) else 0.0
  return memory_bytes(root.shape)


def _is_under_way(one: Instruction) -> bool:
  """Whether it is a later part, or the end, of a collective that passes through several fusions.
  After the first of them comes a custom call that returns all operands and results."""
  return 'chain_id="' in one.rest or 'custom_call_target="AsyncCollectiveDone"' in one.rest


def memory_bytes(shape: str) -> float:
  """Bytes that arrays of a shape, as text, take in the device's large memory, in whole tiles."""
  return float(
    sum(
      _array_bytes(dtype, sizes, layout)
      for dtype, sizes, layout in _ARRAY.findall(shape)
      if not re.search(r"S\([1-9]\d*\)", layout)
    )
  )


def _filled(shape: str) -> int:
  """As memory_bytes, wherever the arrays lie."""
  return sum(_array_bytes(*array) for array in _ARRAY.findall(shape))


def _array_bytes(dtype: str, sizes: str, layout: str) -> int:
  shape = [int(size) for size in sizes.split(",") if size]
  order, _, rest = layout.partition(":")
  tile = re.match(r"T\(([\d,]+)\)", rest)
  if tile and order:
    minor = [int(axis) for axis in order.split(",")]
    for axis, step in zip(minor, reversed([int(size) for size in tile[1].split(",")])):
      shape[axis] = -(-shape[axis] // step) * step
  return program_text.size_of([(dtype, tuple(shape))])


def _shape(one: Instruction) -> tuple[int, ...]:
  return program_text.arrays_of(one.shape)[0][1]


def _called(fusion: Instruction) -> str:
  called = re.search(r"calls=%?([\w.\-]+)", fusion.rest)
  assert called is not None, f"no computation in {fusion.rest[:200]}"
  return called[1]


def _numbers(written: str, name: str) -> list[int]:
  found = re.search(rf"{name}=\{{([\d,]*)\}}", written)
  return [int(number) for number in found[1].split(",") if number] if found else []
