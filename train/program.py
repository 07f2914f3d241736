"""A run laid out on a mesh: its model, optimizer and layouts, and the steps compiled for them."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from data.rows import Batch
from kernels import dispatch
from models import decoder
from models.decoder import DecoderConfig, Model
from sharding import logical, xla_flags
from sharding import rules as tables
from sharding.logical import Rules
from sharding.mesh import RowShare, make_mesh, row_share
from train.config import Run
from train.layer_statistics import statistics_step
from train.loss import row_losses
from train.optimizer import GradientTransformation
from train.state import TrainState, abstract_state, init_state, state_shardings
from train.step import Limits, eval_step, train_step

ZERO_STAGES = {1: tables.ZERO1, 2: tables.ZERO2, 3: tables.ZERO3}


class Program(NamedTuple):
  """What a run is on one mesh; nothing is compiled or allocated yet."""

  run: Run
  mesh: Mesh
  rules: Rules
  model: Model
  tx: GradientTransformation
  shardings: TrainState
  abstract: TrainState  # ShapeDtypeStructs with their shardings
  platform: str  # of the mesh's devices, which need not be here: "cpu", "gpu" or "tpu"
  flags: dict[str, xla_flags.Value]  # XLA flags: what every step of it is compiled with


def build(run: Run, *, devices: Sequence[Any] | None = None) -> Program:
  """The run on a mesh over `devices` (default: all); ValueError if it does not fit that mesh.

  The devices may be those of a machine that is not here (sharding/machine.py): kernels then follow
  their platform, and XLA flags their chip.
  """
  mesh = make_mesh(run.mesh, devices=devices)
  check_fits(run, mesh)
  table = dataclasses.replace(
    ZERO_STAGES[run.zero_stage], float32_sums=run.gradient_sums == "float32"
  )
  device = mesh.devices.flat[0]
  platform, chip = device.platform, xla_flags.key_of(device.device_kind)
  flags = run.xla_flags.resolved(chip)
  xla_flags.log_once(chip, tuple(flags.items()))
  with dispatch.targeting(platform, device_kind=device.device_kind):
    model = decoder.build(run.model)
  tx = run.optimizer.build(total_steps=run.total_steps, decay_mask=model.decays)
  shardings = state_shardings(model, mesh=mesh, rules=table)
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    abstract_state(model, tx),
    shardings,
  )
  return Program(run, mesh, table, model, tx, shardings, abstract, platform, flags)


def initialize(program: Program) -> TrainState:
  """The state before the first step, made in its layout: no device ever holds all of it."""
  key = jax.random.key(program.run.seed)

  def init(key: jax.Array) -> TrainState:
    return init_state(key, model=program.model, tx=program.tx)

  with logical.placement(program.mesh, program.rules):
    return jax.jit(init, out_shardings=program.shardings)(key)


def lower_train_step(program: Program) -> jax.stages.Lowered:
  """The training step `(state, batch, limits) -> (state, StepMetrics)`, the state donated."""
  run = program.run

  def step(state: TrainState, batch: Batch, limits: Limits):
    return train_step(
      state,
      batch,
      limits,
      model=program.model,
      tx=program.tx,
      num_microbatches=run.num_microbatches,
      z_loss=run.z_loss,
      clip_norm=run.optimizer.clip_norm,
    )

  everywhere = _replicated(program.mesh)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, everywhere))
  limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
  with _placed(program):
    return jitted.lower(program.abstract, _abstract_batch(program), Limits(limit, limit))


def compile_step(program: Program, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """A lowered step of `program`, compiled with its flags; ValueError for an unknown flag."""
  flags: dict[str, Any] = dict(program.flags)  # JAX's type has no numbers, which XLA takes
  try:
    return lowered.compile(flags)
  except jax.errors.JaxRuntimeError as error:
    unknown = re.search(r"No such compile option: '(\w+)'", str(error))
    if unknown is None:
      raise
    raise ValueError(
      f"XlaFlags: this compiler for {program.platform} has no flag {unknown[1]}; leave it out of "
      "xla_flags.set, or add it to xla_flags.drop"
    ) from error


def lower_eval_step(program: Program) -> jax.stages.Lowered:
  """The evaluation step `(params, batch) -> LossSums`."""

  def step(params: Any, batch: Batch):
    return eval_step(params, batch, model=program.model)

  with _placed(program):
    return jax.jit(step).lower(program.abstract.params, _abstract_batch(program))


def lower_statistics_step(program: Program) -> jax.stages.Lowered:
  """`(state, batch, square_norms, weight) ->` the values of train/layer_statistics.py, on every
  device; the last two arguments are those of StepMetrics."""
  run = program.run
  replicated = _replicated(program.mesh)

  def step(state: TrainState, batch: Batch, square_norms: Any, weight: jax.Array):
    return statistics_step(
      state,
      batch,
      square_norms,
      weight,
      model=program.model,
      optimizer=run.optimizer,
      total_steps=run.total_steps,
      num_microbatches=run.num_microbatches,
    )

  def scalar(w: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(w.shape[: axes.count("layers")], jnp.float32, sharding=replicated)

  square_norms = jax.tree.map(scalar, program.model.shapes, program.model.axes)
  weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  with _placed(program):
    jitted = jax.jit(step, out_shardings=replicated)
    return jitted.lower(program.abstract, _abstract_batch(program), square_norms, weight)


def compile_statistics_aside(program: Program) -> Future[jax.stages.Compiled]:
  """The statistics step, compiled in a thread: it is needed so late that no step waits for it."""
  thread = ThreadPoolExecutor(1, "compile_statistics")
  compiled = thread.submit(lambda: compile_step(program, lower_statistics_step(program)))
  thread.shutdown(wait=False)
  return compiled


def lower_row_losses(program: Program) -> jax.stages.Lowered:
  """`(params, batch) -> losses_B`, all rows' on every process: train/loss.py: row_losses."""
  model = program.model

  def losses(params: Any, batch: Batch):
    x_BTD, unembed_VD = model.apply(params, batch.tokens_BT, batch.segments_BT)
    return row_losses(x_BTD, unembed_VD, batch, logit_cap=model.config.logit_cap)

  with _placed(program):
    jitted = jax.jit(losses, out_shardings=_replicated(program.mesh))
    return jitted.lower(program.abstract.params, _abstract_batch(program))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows are split over data and fsdp, the time of each row over sequence."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
  """The global arrays of a batch, from this process's share of its rows; each row is whole."""
  sharding = batch_sharding(mesh)
  share = row_share(mesh.devices, jax.process_index())

  def to_global(x_BT: np.ndarray) -> jax.Array:
    shape = (len(x_BT) * share.count, x_BT.shape[1])

    def part(index: Any) -> np.ndarray:
      return local_part(x_BT, share, index)

    return jax.make_array_from_callback(shape, sharding, part)

  return Batch(*(to_global(np.asarray(x)) for x in batch))  # pyright: ignore[reportArgumentType]


def local_part(x_BT: np.ndarray, share: RowShare, index: tuple[slice, ...]) -> np.ndarray:
  """The part `index` (rows, times) of a global array whose rows of `share` are x_BT."""
  rows, times = index
  num_rows = len(x_BT) // len(share.shards)
  first = share.shards.index((rows.start or 0) // num_rows) * num_rows
  return x_BT[first : first + num_rows, times]


def _replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


@contextmanager
def _placed(program: Program) -> Iterator[None]:
  """Within it, models are traced for the program's mesh and platform."""
  kind = program.mesh.devices.flat[0].device_kind
  placed = logical.placement(program.mesh, program.rules)
  with dispatch.targeting(program.platform, device_kind=kind), placed:
    yield


def _abstract_batch(program: Program) -> Batch:
  shape = (program.run.batch_size, program.run.data.row_length)
  sharding = batch_sharding(program.mesh)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
  weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  return Batch(ids, ids, ids, weights)  # pyright: ignore[reportArgumentType]


def check_fits(run: Run, mesh: Mesh | AbstractMesh) -> None:
  """ValueError if the mesh does not divide the sizes and the batch of the run."""
  tables.check_tensor_degree(mesh.shape["tensor"], sizes=_tensor_sizes(run.model))
  row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = run.batch_size // run.num_microbatches
  if rows % row_shards:
    raise ValueError(
      f"Run: {rows} rows of a microbatch (batch_size {run.batch_size} / num_microbatches "
      f"{run.num_microbatches}) are not divisible by the {row_shards} devices of data x fsdp; "
      "change batch_size, num_microbatches or the mesh"
    )
  check_rows_split(run, mesh.shape["sequence"])


def check_rows_split(run: Run, shards: int) -> None:
  """Raises unless every device of the mesh axis sequence gets an equal and usable part of a row."""
  row_length = run.data.row_length
  if row_length % shards:
    raise ValueError(
      f"Run: row_length {row_length} is not divisible by the {shards} devices of the mesh axis "
      "sequence; change data.row_length or mesh.sequence"
    )
  if shards == 1:
    return
  for block in run.model.pattern[: run.model.num_blocks]:
    least = block.least_tokens_per_shard()
    if row_length // shards < least.tokens:
      raise ValueError(
        f"Run: row_length {row_length} over the {shards} devices of the mesh axis sequence "
        f"leaves {row_length // shards} tokens to each, fewer than the {least.tokens} that "
        f"{least.reason}; use longer rows or a smaller mesh.sequence"
      )


def _tensor_sizes(config: DecoderConfig) -> dict[str, int]:
  """The sizes that tensor parallelism splits, by their names in the config; where blocks of the
  pattern differ in a size, also by its path in each block."""
  sizes = {"vocab_size": config.vocab_size}
  for index, block in enumerate(config.pattern[: config.num_blocks]):
    for path, size in block.tensor_sizes().items():
      name = path.rpartition(".")[2]
      is_another = sizes.setdefault(name, size) != size
      sizes |= {f"pattern[{index}].{path}": size} if is_another else {}
  return sizes
