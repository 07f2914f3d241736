"""Bytes that a training step holds on one device, by part, from config and mesh alone.

What devices hold between steps is exact: shapes and layout tables. What lives inside a step is a
model of what the compiler does (train/planning/activations.py), checked against compiled programs
(docs/plans.jsonl).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from kernels import dispatch
from models import decoder
from models.costs import Shard
from models.decoder import DecoderConfig
from sharding import logical
from sharding.logical import Axes, Table
from sharding.mesh import MeshShape
from train.config import Run
from train.planning.activations import Activations, of_block
from train.program import ZERO_STAGES

_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4
# Blocks' worth of gathered parameters and whole gradients alive at once, found by compiling for
# TPU: the one computed, the one gathered ahead, and gradients that wait for their reduction.
_BLOCKS = 5


class Leaf(NamedTuple):
  """A parameter: its name, the names of its dimensions, its shape, the bytes of a stored number."""

  name: str
  axes: Axes
  shape: tuple[int, ...]
  itemsize: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
  """Bytes on each device.

  parameters, moments, batch  between steps; exact
  gradients    in float32, laid out as the tables say
  activations  kept for the backward pass, and alive at its peak
  weights      gathered parameters and whole gradients of the blocks being computed
  """

  parameters: float
  moments: float
  batch: float
  gradients: float
  activations: float
  weights: float

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))

  @property
  def temporaries(self) -> float:
    """What a compiled program reports as temporaries."""
    return self.gradients + self.activations + self.weights


@functools.lru_cache(maxsize=256)
def named_kernels(config: DecoderConfig, platform: str) -> DecoderConfig:
  """`config` with the kernels that run on `platform` named in its blocks."""
  with dispatch.targeting(platform):
    return config.resolved()


def resolved_kernels(config: DecoderConfig, platform: str) -> dict[str, str]:
  """Op -> what the first block that has it runs on `platform`."""
  with dispatch.targeting(platform):
    return config.kernels()


def footprint(run: Run, mesh: MeshShape, *, platform: str) -> Footprint:
  """The bytes of one step of `run` on `mesh`; ValueError where the mesh does not divide the run."""
  itemsize = _BYTES[run.model.dtype]
  tokens = run.batch_size * run.data.row_length / token_shards(mesh)
  part_tokens = tokens / run.num_microbatches

  blocks = block_activations(run, mesh, platform=platform)
  saved = sum(one.saved for one in blocks)
  working = max(one.working for one in blocks)
  # The loss: its gradient by the hidden states in float32, and those states.
  working = max(working, run.model.width * (_FLOAT32 + 2 * itemsize))

  numbers = compute_numbers(run.model, mesh, platform)
  state = state_bytes(run, mesh, platform=platform)
  # Microbatches add the table's gradient up in float32; one alone has it as it is computed.
  gradient = _FLOAT32 if run.num_microbatches > 1 else itemsize
  return Footprint(
    parameters=state.parameters,
    moments=state.moments,
    batch=4 * _FLOAT32 * tokens,
    gradients=state.gradients,
    activations=part_tokens * (saved + working),
    # The table and its gradient; of blocks, what is gathered and whole gradients.
    weights=numbers.embedding * (itemsize + gradient) + _BLOCKS * numbers.largest_block * itemsize,
  )


def block_activations(run: Run, mesh: MeshShape, *, platform: str) -> tuple[Activations, ...]:
  """The activations of every block, first to last."""
  model, shard = named_kernels(run.model, platform), shard_of(run, mesh)
  kinds = {block: of_block(block, width=model.width, shard=shard) for block in model.pattern}
  return tuple(kinds[block] for block in model.blocks)


def shard_of(run: Run, mesh: MeshShape) -> Shard:
  """What each device has of the blocks of a step."""
  return Shard(
    rows=run.batch_size / (mesh.data * mesh.fsdp),
    row_length=run.data.row_length,
    tensor=mesh.tensor,
    sequence=mesh.sequence,
    itemsize=_BYTES[run.model.dtype],
    remat=run.model.remat,
    is_unrolled=run.model.layers == "unroll",
  )


def token_shards(mesh: MeshShape) -> int:
  """Over how many devices the tokens of a batch are split."""
  return mesh.data * mesh.fsdp * mesh.sequence


class StateBytes(NamedTuple):
  """On one device: parameters and moments as stored, gradients in float32 as they are summed."""

  parameters: float
  moments: float
  gradients: float


def state_bytes(run: Run, mesh: MeshShape, *, platform: str) -> StateBytes:
  """The state of `run` on `mesh`; ValueError where the mesh does not divide a parameter."""
  config = dataclasses.replace(run.model, remat="block")
  return _state_bytes(config, platform, run.zero_stage, mesh, _BYTES[run.optimizer.moment_dtype])


@functools.lru_cache(maxsize=4096)
def _state_bytes(
  config: DecoderConfig, platform: str, zero_stage: int, mesh: MeshShape, moment_size: int
) -> StateBytes:
  tables = ZERO_STAGES[zero_stage]
  parameters = moments = gradients = 0.0
  for leaf in leaves(config, platform):
    numbers = math.prod(leaf.shape)
    parameters += numbers / _shards(leaf, tables.parameters, mesh) * leaf.itemsize
    moments += numbers / _shards(leaf, tables.moments, mesh) * 2 * moment_size
    gradients += numbers / _shards(leaf, tables.gradients, mesh) * _FLOAT32
  return StateBytes(parameters, moments, gradients)


def leaves(config: DecoderConfig, platform: str) -> tuple[Leaf, ...]:
  """Every parameter of the model."""
  return _leaves(dataclasses.replace(config, remat="block"), platform)


@functools.lru_cache(maxsize=32)
def _leaves(config: DecoderConfig, platform: str) -> tuple[Leaf, ...]:
  with dispatch.targeting(platform):
    model = decoder.build(config)
  shapes, structure = jax.tree_util.tree_flatten_with_path(model.shapes)
  axes = structure.flatten_up_to(model.axes)
  return tuple(
    Leaf(
      jax.tree_util.keystr(path, simple=True, separator="/"),
      names,
      leaf.shape,
      leaf.dtype.itemsize,
    )
    for (path, leaf), names in zip(shapes, axes, strict=True)
  )


def _shards(leaf: Leaf, table: Table, mesh: MeshShape) -> int:
  """Over how many devices a parameter is split."""
  layout = logical.spec(leaf.axes, table, shape=leaf.shape, mesh=mesh.abstract, name=leaf.name)
  return math.prod(
    getattr(mesh, axis)
    for entry in layout
    for axis in ((entry,) if isinstance(entry, str) else entry or ())
  )


class ComputeNumbers(NamedTuple):
  """Numbers of parameters on one device as layers use them: gathered over ZeRO's axis."""

  embedding: float
  blocks: float  # all of them
  largest_block: float


@functools.lru_cache(maxsize=4096)
def compute_numbers(config: DecoderConfig, mesh: MeshShape, platform: str) -> ComputeNumbers:
  table = ZERO_STAGES[3].compute
  embedding, total, runs = 0.0, 0.0, {}
  for leaf in leaves(config, platform):
    numbers = math.prod(leaf.shape) / _shards(leaf, table, mesh)
    if "vocab" in leaf.axes:
      embedding += numbers
    num_stacked = sum(name == "layers" for name in leaf.axes)
    if num_stacked:
      total += numbers
      stack = leaf.shape[:num_stacked]
      runs.setdefault(stack, []).append(numbers / math.prod(stack))
  # Stacks of one shape are not told apart: their sum is an upper bound for each.
  return ComputeNumbers(embedding, total, max((sum(sizes) for sizes in runs.values()), default=0.0))
