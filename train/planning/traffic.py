"""What a training step moves and computes on one device, from config and mesh alone.

`hbm_bytes`: through the device's memory. `collectives`: between devices, in the terms that
sharding/collectives.py reads from a compiled program. `executed_flops`: with what is computed
again. Each term is explained where it is added up; activations are those of activations.py.
"""

import collections
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from models.costs import Sent
from models.flops import flops_per_token
from sharding.machine import Machine, positions
from sharding.mesh import MeshShape
from sharding.topology import Chip
from train.config import Run
from train.planning.footprint import (
  block_activations,
  compute_numbers,
  named_kernels,
  shard_of,
  state_bytes,
  token_shards,
)
from train.planning.roofline import Executed, Transfer, transfer

_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = _INT32 = 4
# Logits are made twice, forward and again in the backward pass, a chunk of the vocabulary at a
# time; a chunk's float32 logits are written, and read for the sum and for the product.
_LOGIT_PASSES = 6
_TILE_ROWS = 8


class HbmBytes(NamedTuple):
  """Bytes through the memory of one device in one step."""

  optimizer: float
  weights: float
  gradients: float
  activations: float
  logits: float
  relayouts: float  # gathered weights, copied into whole tiles

  @property
  def total(self) -> float:
    return sum(self)


def hbm_bytes(run: Run, mesh: MeshShape, *, chip: Chip) -> HbmBytes:
  """The bytes by what they are for."""
  platform = chip.platform
  state = state_bytes(run, mesh, platform=platform)
  numbers = compute_numbers(run.model, mesh, platform)
  size = _BYTES[run.model.dtype]
  used = numbers.embedding + numbers.blocks
  parts = run.num_microbatches
  passes = 2 if run.model.remat == "none" else 3
  tokens = run.batch_size * run.data.row_length / token_shards(mesh)
  blocks = block_activations(run, mesh, platform=platform)
  logits = run.model.vocab_size / mesh.tensor * _FLOAT32 * _LOGIT_PASSES
  ends = 10 * run.model.width * size  # embedding, final norm, the loss's gradient
  return HbmBytes(
    # Parameters and moments are read and written once, gradients read twice: norm, update.
    optimizer=2 * (state.parameters + state.moments) + 2 * state.gradients,
    # For each microbatch, forward and again backward: stored shards read, the cast and gathered
    # parameters written, and then read by each product: forward, again, backward.
    weights=parts * (2 * (state.parameters + used * size) + passes * used * size),
    # Written in the activations' dtype, reduced, and added to the float32 sum (read, written).
    gradients=parts * (2 * used * size + (2 * state.gradients if parts > 1 else state.gradients)),
    activations=tokens * (sum(one.moved for one in blocks) + ends),
    logits=tokens * logits,
    relayouts=_relayouts(run, mesh, used, chip),
  )


def _relayouts(run: Run, mesh: MeshShape, used: float, chip: Chip) -> float:
  """On a TPU the rows of an array come in tiles of 8. Where a shard of the width is no multiple of
  that, gathered weights lie in no order that a product can read, and the compiler for a v5e copies
  them: read and written, forward and again backward."""
  fills_tiles = run.model.width % (_TILE_ROWS * mesh.fsdp) == 0
  if chip.reached.relayout is None or mesh.fsdp == 1 or run.zero_stage < 3 or fills_tiles:
    return 0.0
  return run.num_microbatches * 2 * 2 * used * _BYTES[run.model.dtype]


def executed_flops(run: Run, *, platform: str) -> Executed:
  """FLOPs of one token with what is computed again; the model's are `Flops.train`."""
  flops = flops_per_token(named_kernels(run.model, platform), run.data.row_length)
  inside = [part for part in flops.counted if part.kind == "attention"]
  keys = sum(part.flops for part in inside)
  linear, logits = flops.forward - keys, flops["logits"]
  attention_again = 0.0 if run.model.remat == "none" else keys
  if run.model.remat == "block":
    # All but each block's last product: nothing needs its result again.
    again = linear - logits - sum(part.last for part in flops.counted)
  else:
    again = sum(part.batched for part in flops.counted)
  return Executed(
    # Logits are formed again from x.
    matmul=3.0 * linear + logits + again,
    attention_forward=keys + attention_again,
    # The backward pass forms attention's weights again: 5 products where the forward pass has 2.
    attention_backward=2.5 * keys,
    visited=sum(part.executed for part in inside) / keys if keys else 1.0,
  )


def collectives(run: Run, mesh: MeshShape, machine: Machine) -> tuple[Transfer, ...]:
  """What is sent in one step, as the layout tables demand it."""
  platform = machine.chip.platform
  numbers = compute_numbers(run.model, mesh, platform)
  state = state_bytes(run, mesh, platform=platform)
  size, parts = _BYTES[run.model.dtype], run.num_microbatches
  used = (numbers.embedding + numbers.blocks) * size
  blocks = run.model.num_blocks
  tokens = run.batch_size * run.data.row_length / token_shards(mesh)
  stream = tokens * run.model.width * size
  found = []

  def add(kind: str, axes: tuple[str, ...], times: int, num_bytes: float) -> None:
    axes = tuple(axis for axis in axes if getattr(mesh, axis) > 1)
    if axes:
      group = positions(mesh, axes).tolist()
      if kind == "collective-permute":
        group = max(itertools.pairwise(group), key=machine.islands)
      found.append(
        transfer(kind, axes, group, times=times, num_bytes=num_bytes, machine=machine, mesh=mesh)
      )

  if run.zero_stage == 3:
    # Forward and again backward, but the table, which is kept.
    add("all-gather", ("fsdp",), parts * 2 * blocks, parts * (2 * used - numbers.embedding * size))
  elif mesh.fsdp > 1:
    # New parameters, from the shards that the moments' owners updated.
    add("all-gather", ("fsdp",), 1, state.parameters)
  sums = used * (_FLOAT32 / size if run.gradient_sums == "float32" else 1.0)
  if run.zero_stage == 1:
    add("all-reduce", ("data", "fsdp", "sequence"), parts * blocks, parts * sums)
  else:
    add("reduce-scatter", ("fsdp",), parts * blocks, parts * sums)
    add("all-reduce", ("data", "sequence"), parts * blocks, parts * sums / mesh.fsdp)
  # The embedding's sum, and what blocks send.
  sent = [Sent("all-reduce", "tensor", 1, stream), *_between_shards(run, mesh, platform)]
  for axis, kind in (
    ("tensor", "all-reduce"),
    ("sequence", "all-gather"),
    ("sequence", "reduce-scatter"),
    ("sequence", "collective-permute"),
  ):
    of_kind = [one for one in sent if (one.axis, one.kind) == (axis, kind)]
    if of_kind:
      times = parts * sum(one.times for one in of_kind)
      add(kind, (axis,), times, sum(one.bytes for one in of_kind))
  return tuple(found)


def _between_shards(run: Run, mesh: MeshShape, platform: str) -> Iterator[Sent]:
  """What tensor shards and the shards of a row send each other."""
  model, shard = named_kernels(run.model, platform), shard_of(run, mesh)
  if mesh.sequence > 1:
    # Documents are numbered once for all layers: the last id, how many begin and where the last
    # does.
    yield Sent("collective-permute", "sequence", 1, shard.rows * _INT32)
    yield Sent("all-gather", "sequence", 1, mesh.sequence * 2 * shard.rows * _INT32)
  for block, number in collections.Counter(model.blocks).items():
    once, each = block.sends(model.width, shard)
    if model.blocks_wait:
      each += once
    yield from once
    for one in each:
      yield one._replace(times=number * one.times, bytes=number * one.bytes)
