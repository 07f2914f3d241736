"""What a compiled training step executes, by part of the model, and how long that takes.

Read from the program (sharding/program_cost.py): FLOPs and bytes of every operation, and the
compiler's own estimate of its cycles. Custom kernels have no FLOPs there; a layer whose kernels
multiply matrices says which of its products each of them forms (models/costs.py). This gives two
times, both for operations that run one after another, as on a TPU:

  seconds    each operation the longer of its FLOPs and its bytes, at the shares of the chip's peaks
             that kernels reach (sharding/topology.py)
  estimated  the compiler's cycles; kernels, which have none, as in `seconds`

Of collectives, both count only the bytes that they read and write in memory. The time of the whole
step adds half of the time that they take, as train/planning/roofline.py does.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from models.decoder import DecoderConfig
from sharding.program_cost import Operation, operations
from sharding.topology import Chip
from train.planning.roofline import Transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
  """Of one step and device."""

  flops: float = 0.0
  bytes: float = 0.0
  seconds: float = 0.0
  estimated: float = 0.0

  def __add__(self, other: "PartCost") -> "PartCost":
    return PartCost(
      flops=self.flops + other.flops,
      bytes=self.bytes + other.bytes,
      seconds=self.seconds + other.seconds,
      estimated=self.estimated + other.estimated,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCost:
  """A step by part: named scopes of the layers, "stack" for what loops over blocks carry, "rest"
  for the optimizer and all else."""

  parts: dict[str, PartCost]
  sent_seconds: float  # of collectives
  has_estimates: bool

  @property
  def total(self) -> PartCost:
    return sum(self.parts.values(), start=PartCost())

  @property
  def expected_seconds(self) -> float:
    return self.total.seconds + self.sent_seconds / 2

  @property
  def estimated_seconds(self) -> float | None:
    """None where the program has no estimates, or the chip no known clock."""
    return self.total.estimated + self.sent_seconds / 2 if self.has_estimates else None

  def as_json(self) -> dict[str, Any]:
    """Numbers of one step and device; bytes and FLOPs are what the program moves and computes."""
    return {
      "parts": {name: dataclasses.asdict(part) for name, part in sorted(self.parts.items())},
      "flops": self.total.flops,
      "hbm_bytes": self.total.bytes,
      "collective_seconds": self.sent_seconds,
      "expected_seconds": self.expected_seconds,
      "estimated_seconds": self.estimated_seconds,
    }


class _Kernel(NamedTuple):
  """A custom kernel as its layers declare it: the FLOPs for each token of one pass over all blocks
  that have it, and in how many calls that is."""

  scope: str
  is_backward: bool
  flops: float
  calls: int


def program_cost(
  text: str,
  *,
  chip: Chip,
  model: DecoderConfig,
  row_length: int,
  num_microbatches: int,
  tokens_per_device: float,
  transfers: Iterable[Transfer],
) -> ProgramCost:
  """The cost of the program `text` of a step of `model`, its kernels named, on `chip`; ValueError
  for a kernel that no layer declares."""
  parts: dict[str, PartCost] = {}
  found = operations(text)
  kernels = _kernels(model, row_length, num_microbatches)
  scopes = ("loss", *itertools.chain(*(block.scopes() for block in model.pattern)))
  calls: dict[str, int] = {}
  for one in found:
    if (name := _declared(one, kernels)) is not None:
      calls[name] = calls.get(name, 0) + one.times
  for one in found:
    name, scope = _declared(one, kernels), _scope(one, scopes)
    if name is None:
      _check_known(one, kernels, scope)
      cost = _cost(one, chip)
    else:
      kernel = kernels[name]
      passes = max(1, round(calls[name] / kernel.calls))
      flops = kernel.flops * tokens_per_device * passes * one.times / calls[name]
      cost, scope = _kernel_cost(one, chip, flops, is_backward=kernel.is_backward), kernel.scope
    parts[scope] = parts.get(scope, PartCost()) + cost
  return ProgramCost(
    parts=parts,
    sent_seconds=sum(one.link_seconds + one.network_seconds for one in transfers),
    has_estimates=chip.clock is not None and any(one.cycles for one in found),
  )


def _kernels(model: DecoderConfig, row_length: int, num_microbatches: int) -> dict[str, _Kernel]:
  """The kernels that the blocks declare, by how their names begin; FLOPs of one token."""
  found: dict[str, _Kernel] = {}
  for block, number in collections.Counter(model.blocks).items():
    for part in block.flops(model.width, row_length):
      for one in part.kernels:
        flops, calls = number * part.executed * one.share, number * num_microbatches
        if (before := found.get(one.name)) is not None:
          flops, calls = flops + before.flops, calls + before.calls
        found[one.name] = _Kernel(part.scope, one.is_backward, flops, calls)
  return found


def _declared(one: Operation, kernels: Mapping[str, _Kernel]) -> str | None:
  """The name under which a layer declares this kernel; None for other operations, and for a kernel
  that no layer declares."""
  if one.kernel is None:
    return None
  return next((name for name in kernels if one.kernel.startswith(name)), None)


def _check_known(one: Operation, kernels: Mapping[str, _Kernel], scope: str) -> None:
  """Raises for a kernel that may multiply matrices unseen: one in the scope of a layer that
  declares others, or with a name like theirs; some have no scope."""
  if one.kernel is None:
    return
  words = {name.split("_")[0] for name in kernels}
  if scope in {kernel.scope for kernel in kernels.values()} or one.kernel.split("_")[0] in words:
    raise ValueError(
      f"compiled_cost: no layer declares the kernel {one.kernel!r} of the compiled step; name it "
      "in the `kernels` of a FlopsPart (models/costs.py)"
    )


def _cost(one: Operation, chip: Chip) -> PartCost:
  if one.sends:
    return PartCost(bytes=one.times * one.bytes)
  reached = chip.reached
  seconds = max(
    one.flops / (reached.matmul * chip.peak_flops),
    one.bytes / (reached.hbm * chip.hbm_bytes_per_second),
  )
  # Kernels without products of matrices read and write: the RG-LRU.
  estimated = seconds if one.cycles is None and one.kernel else 0.0
  if one.cycles is not None and chip.clock is not None:
    estimated = one.cycles / chip.clock
  return PartCost(
    flops=one.times * one.flops,
    bytes=one.times * one.bytes,
    seconds=one.times * seconds,
    estimated=one.times * estimated,
  )


def _kernel_cost(one: Operation, chip: Chip, flops: float, *, is_backward: bool) -> PartCost:
  """All calls of a kernel, with `flops` in them, at the rates of attention."""
  reached = chip.reached
  share = reached.attention_backward if is_backward else reached.attention_forward
  seconds = flops / (share * chip.peak_flops)
  return PartCost(flops=flops, bytes=one.times * one.bytes, seconds=seconds, estimated=seconds)


def _scope(one: Operation, scopes: Iterable[str]) -> str:
  # The innermost scope that is one of a layer's: .../recurrent/gates/dot_general is the gates'.
  places = {name: one.op_name.rfind(name) for name in scopes if _has(one.op_name, name)}
  if places:
    return max(places, key=lambda name: places[name])
  return "stack" if "while/body" in one.op_name else "rest"


def _has(op_name: str, name: str) -> bool:
  """Whether a path of names has this one, also as the argument of a transformation."""
  return name in op_name.replace("(", "/").replace(")", "/").split("/")
