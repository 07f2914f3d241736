"""What a compiled training step executes, by part of the model, and how long that takes.

Read from the program (sharding/program_cost.py): FLOPs and bytes of every operation, and the
compiler's own estimate of its cycles. Attention's kernels have no FLOPs there; theirs follow from
the model: how many of attention's products each kernel forms, at the keys that it visits. Two times
come of it, both of operations one after another, as a TPU runs them:

  seconds    each operation the longer of its FLOPs and its bytes, at the shares of the chip's peaks
             that kernels reach (sharding/topology.py)
  estimated  the compiler's cycles; kernels, which have none, as in `seconds`

Collectives are in neither but for the bytes that they read and write; the whole adds half of what
they take, as train/planning/roofline.py does.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from sharding.program_cost import Operation, operations
from sharding.topology import Chip
from train.planning.roofline import Executed, Transfer

# Products that a kernel of attention forms, of queries with the keys they visit; the backward
# kernels' shares of the peak are for 5 products in all, of which each counts its part.
_KEYS, _QUERIES = 5 * 4 / 7, 5 * 3 / 7
_PRODUCTS = {
  "splash_mqa_fwd": 2.0,
  "splash_mqa_dkv": _KEYS,
  "splash_mqa_dq": _QUERIES,
  "local_attention_forward": 2.0,
  "local_attention_backward_keys": _KEYS,
  "local_attention_backward_queries": _QUERIES,
}
_FORWARD = ("splash_mqa_fwd", "local_attention_forward")
_PARTS = ("loss", "mlp", "gates", "conv", "scan", "recurrent", "attention")


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


def program_cost(
  text: str,
  *,
  chip: Chip,
  executed: Executed,
  tokens_per_device: float,
  attention_calls: int,
  transfers: Iterable[Transfer],
) -> ProgramCost:
  """The cost of the program `text` of a step on `chip`. `executed` are the model's FLOPs of a
  token. `attention_calls` of a kernel are one pass over all blocks that have it and all
  microbatches."""
  # One of attention's products, of all blocks and tokens of the device.
  product = executed.attention_backward / 5 * executed.visited * tokens_per_device
  parts: dict[str, PartCost] = {}
  found = operations(text)
  calls: dict[str, int] = {}
  for one in found:
    if (kernel := _attention(one)) is not None:
      calls[kernel] = calls.get(kernel, 0) + one.times
  for one in found:
    kernel = _attention(one)
    if kernel is None:
      cost = _cost(one, chip)
    else:
      passes = max(1, round(calls[kernel] / attention_calls))
      cost = _kernel_cost(one, chip, kernel, product * passes * one.times / calls[kernel])
    name = _part(one)
    parts[name] = parts.get(name, PartCost()) + cost
  return ProgramCost(
    parts=parts,
    sent_seconds=sum(one.link_seconds + one.network_seconds for one in transfers),
    has_estimates=chip.clock is not None and any(one.cycles for one in found),
  )


def _attention(one: Operation) -> str | None:
  """Which kernel of attention it is; ValueError for one that is not known."""
  if one.kernel is None or not ("splash" in one.kernel or "attention" in one.kernel):
    return None
  for name in _PRODUCTS:
    if one.kernel.startswith(name):
      return name
  raise ValueError(f"compiled_cost: nothing is known of the kernel {one.kernel!r}")


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


def _kernel_cost(one: Operation, chip: Chip, kernel: str, product: float) -> PartCost:
  """Of all calls of an attention kernel; `product` are the FLOPs of one product in them."""
  reached = chip.reached
  share = reached.attention_forward if kernel in _FORWARD else reached.attention_backward
  seconds = _PRODUCTS[kernel] * product / (share * chip.peak_flops)
  return PartCost(
    flops=_PRODUCTS[kernel] * product,
    bytes=one.times * one.bytes,
    seconds=seconds,
    estimated=seconds,
  )


def _part(one: Operation) -> str:
  if _attention(one) is not None:
    return "attention"
  # The innermost scope that is one of a layer's: .../recurrent/gates/dot_general is the gates'.
  places = {name: one.op_name.rfind(name) for name in _PARTS if _has(one.op_name, name)}
  if places:
    return max(places, key=lambda name: places[name])
  return "stack" if "while/body" in one.op_name else "rest"


def _has(op_name: str, name: str) -> bool:
  """Whether a path of names has this one, also as the argument of a transformation."""
  return name in op_name.replace("(", "/").replace(")", "/").split("/")
