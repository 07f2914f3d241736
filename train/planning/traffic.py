"""What a training step moves and computes on one device, from config and mesh alone.

`hbm_bytes`: through the device's memory. `collectives`: between devices, in the terms that
sharding/collectives.py reads from a compiled program. `executed_flops`: with what is computed
again. Terms are written out where they are added up; activations are those of activations.py.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from kernels.local_attention import splash_tpu
from models.flops import Flops, visible_keys
from models.layers import attention, rg_lru
from sharding.machine import Machine, positions
from sharding.mesh import MeshShape
from sharding.topology import Chip
from train.config import Run
from train.planning.activations import UNFUSED_SCANS
from train.planning.footprint import (
  block_activations,
  compute_numbers,
  resolved_kernels,
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


def executed_flops(run: Run, flops: Flops, *, platform: str) -> Executed:
  """FLOPs of one token with what is computed again; the model's are `flops.train`."""
  keys = flops.attention_keys
  linear = flops.forward - keys
  attention_again = 0.0 if run.model.remat == "none" else keys
  again = _gate_flops(run)
  if run.model.remat == "block":
    # All but each block's last product, a third of the MLP: nothing needs its result again.
    again = linear - flops.logits - flops.mlp / 3
  return Executed(
    # Logits are formed again from x.
    matmul=3.0 * linear + flops.logits + again,
    attention_forward=keys + attention_again,
    # The backward pass forms attention's weights again: 5 products where the forward pass has 2.
    attention_backward=2.5 * keys,
    visited=_visited(run, platform),
  )


def _visited(run: Run, platform: str) -> float:
  """Keys in the blocks that attention's kernel visits, over those that queries see. The shares of
  the peak that are published for GPUs are of the latter."""
  if resolved_kernels(run.model, platform).get("local_attention") != "splash_tpu":
    return 1.0
  seen = visited = 0.0
  for block in run.model.blocks:
    if isinstance(block.mixer, attention.Config):
      width = block.mixer.num_heads * block.mixer.head_size
      seen += width * visible_keys(run.data.row_length, block.mixer.window)
      visited += width * splash_tpu.visited_keys(run.data.row_length, block.mixer.window)
  return visited / seen


def _gate_flops(run: Run) -> float:
  """The gates' products, which no remat keeps."""
  total = 0.0
  for block in run.model.blocks:
    mixer = block.mixer
    if not isinstance(mixer, attention.Config):
      rnn_width = mixer.rnn_width  # pyright: ignore[reportAttributeAccessIssue]
      total += 4.0 * rnn_width * (rnn_width // mixer.num_gate_blocks)  # pyright: ignore
  return total


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
  # Megatron: behind each half of a block forward and backward, behind the mixer once more where it
  # is computed again, and behind the embedding.
  times = 4 + (run.model.remat == "block")
  add("all-reduce", ("tensor",), parts * (times * blocks + 1), (times * blocks + 1) * stream)
  for sent in _between_shards(run, mesh, platform) if mesh.sequence > 1 else ():
    add(sent.kind, ("sequence",), sent.times, sent.bytes)
  return tuple(found)


class _Sent(NamedTuple):
  """Equal collectives of one step: how many, and the bytes of all of them."""

  kind: str
  times: int
  bytes: float


def _between_shards(run: Run, mesh: MeshShape, platform: str) -> Iterator[_Sent]:
  """What the shards of a row tell each other, one line for each kind."""
  rows = run.batch_size / (mesh.data * mesh.fsdp)
  time = run.data.row_length // mesh.sequence
  # Documents are numbered once for all layers: the last id, how many begin and where the last does.
  found = [
    _Sent("collective-permute", 1, rows * _INT32),
    _Sent("all-gather", 1, mesh.sequence * 2 * rows * _INT32),
  ]
  is_fused = resolved_kernels(run.model, platform).get("rg_lru") not in UNFUSED_SCANS
  for mixer in dict.fromkeys(block.mixer for block in run.model.blocks):
    match mixer:
      case rg_lru.Config():
        once, each = _recurrence_sends(run, mesh, mixer, rows=rows, is_fused=is_fused)
      case attention.Config():
        once, each = _attention_sends(run, mesh, mixer, rows=rows, time=time)
      case _:
        raise TypeError(f"traffic: no rule for the mixer {type(mixer).__qualname__}")
    number = sum(block.mixer == mixer for block in run.model.blocks)
    found += once
    if run.model.blocks_wait:
      each += once
    found += [_Sent(one.kind, number * one.times, number * one.bytes) for one in each]
  for kind in ("all-gather", "reduce-scatter", "collective-permute"):
    of_kind = [one for one in found if one.kind == kind]
    if of_kind:
      times = sum(one.times for one in of_kind)
      yield _Sent(kind, run.num_microbatches * times, sum(one.bytes for one in of_kind))


def _recurrence_sends(
  run: Run, mesh: MeshShape, mixer: rg_lru.Config, *, rows: float, is_fused: bool
) -> tuple[list[_Sent], list[_Sent]]:
  """Once for all layers, documents that the convolution asks for; of each: every shard's product of
  decays and last state for a scan, the convolution's halo, and unfused the decay that a gradient
  meets between shards."""
  width, taps = mixer.rnn_width / mesh.tensor, mixer.conv_taps - 1
  # Forward and backward; again, unless states are kept. The convolution is never kept.
  scans = 2 if run.model.remat == "none" else 3
  pairs = mesh.sequence * 2 * rows * width * _FLOAT32
  conv = rows * taps * width * _BYTES[run.model.dtype]
  each = [
    _Sent("all-gather", scans, scans * pairs),
    _Sent("collective-permute", 3, 3 * conv),
  ]
  if not is_fused:
    each.append(_Sent("collective-permute", 1, rows * width * _FLOAT32))
  return [_Sent("collective-permute", 1, rows * taps * _INT32)], each


def _attention_sends(
  run: Run, mesh: MeshShape, mixer: attention.Config, *, rows: float, time: int
) -> tuple[list[_Sent], list[_Sent]]:
  """Documents once, and of each layer keys and values: forward, again, and their gradients."""
  size = mixer.head_size * _BYTES[run.model.dtype]
  if mixer.window is None:
    tokens = rows * run.data.row_length
    return [_Sent("all-gather", 1, tokens * _INT32)], [
      _Sent("all-gather", 4, 4 * tokens * size),
      _Sent("reduce-scatter", 2, 2 * tokens * size),
    ]
  # From as many shards before as hold a window.
  window = min(mixer.window, (mesh.sequence - 1) * time)
  shards = math.ceil(window / time)
  return [_Sent("collective-permute", shards, rows * window * _INT32)], [
    _Sent("collective-permute", 6 * shards, 6 * rows * window * size)
  ]
