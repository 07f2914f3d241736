"""One run on one machine: does it fit, what does it send, how fast can it be, what does it cost.

`compiled(run, machine)` compiles the real training step for the real chip, without such a chip, and
reads memory, collectives and what is executed (`program`) from it. `modelled(run, machine)` takes
memory and collectives from the models in footprint.py and traffic.py; that takes milliseconds.
FLOPs and HBM bytes of the roofline are analytic in both.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from models.flops import Flops, flops_per_token
from sharding import collectives as compiled_collectives
from sharding.machine import Machine
from sharding.mesh import AXES, MeshShape, check_slices
from sharding.topology import Chip
from train import program as programs
from train.config import Run
from train.planning.compiled_cost import ProgramCost, program_cost
from train.planning.footprint import (
  Footprint,
  footprint,
  leaves,
  named_kernels,
  resolved_kernels,
)
from train.planning.roofline import Roofline, Transfer, roofline, transfer
from train.planning.traffic import HbmBytes, collectives, executed_flops, hbm_bytes

_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes on each device while the step runs. Gradients are where the layout puts them, in
  float32; activations are everything else that lives inside the step."""

  parameters: float
  moments: float
  batch: float
  gradients: float
  activations: float
  code: float
  limit: float

  @property
  def parts(self) -> dict[str, float]:
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != "limit"
    }

  @property
  def total(self) -> float:
    return sum(self.parts.values())

  @property
  def fits(self) -> bool:
    return self.total <= self.limit

  @property
  def margin(self) -> float:
    """The share of the memory that is left; negative where it does not fit."""
    return 1.0 - self.total / self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a run needs and can reach on a machine. Seconds of `roofline` are of one step."""

  run: Run
  machine: Machine
  mesh: MeshShape
  kernels: dict[str, str]
  xla_flags: dict[str, bool | int | str]
  parameters: int
  memory: Memory
  collectives: tuple[Transfer, ...]
  flops: Flops
  executed_flops: float  # per token
  hbm: HbmBytes
  roofline: Roofline
  is_compiled: bool
  program: ProgramCost | None = None  # of a program that was compiled and fits
  compile_seconds: float | None = None
  model_error: float | None = None  # of the memory model, as a share of what the compiler needs
  refusal: str | None = None  # the compiler's message where there was not enough memory

  @property
  def chip(self) -> Chip:
    return self.machine.chip

  @property
  def fits(self) -> bool:
    return self.memory.fits and self.refusal is None

  @property
  def tokens_per_step(self) -> int:
    return self.run.batch_size * self.run.data.row_length

  @property
  def budget_tokens(self) -> int:
    return self.tokens_per_step * self.run.total_steps

  def tokens_per_second(self, mfu: float | None = None) -> float:
    """Of all devices: at the roofline, or at this MFU."""
    if mfu is None:
      return self.tokens_per_step / self.roofline.step_seconds
    return mfu * self.chip.peak_flops * self.machine.num_devices / self.flops.train

  def budget(self, mfu: float | None, price_per_chip_hour: float | None) -> dict[str, float]:
    """What the config's tokens take: days, chip-hours and, where a price is given, money."""
    rate = self.tokens_per_second(mfu)
    days = self.budget_tokens / rate / 86400
    chip_hours = days * 24 * self.machine.num_chips
    found = {
      "tokens": float(self.budget_tokens),
      "tokens_per_second": rate,
      "tokens_per_day": rate * 86400,
      "days": days,
      "chip_hours": chip_hours,
    }
    if price_per_chip_hour is not None:
      found["cost"] = chip_hours * price_per_chip_hour
    return found

  def as_json(self, *, mfu: float | None, price_per_chip_hour: float | None) -> dict[str, Any]:
    """Everything as plain numbers and strings; bytes and seconds are of one device and step."""
    memory, times = self.memory, self.roofline
    return {
      "config": self.run.name,
      "machine": str(self.machine),
      "chip": self.chip.key,
      "chips": self.machine.num_chips,
      "devices": self.machine.num_devices,
      "mesh": dict(zip(AXES, self.mesh.sizes)),
      "zero_stage": self.run.zero_stage,
      "remat": self.run.model.remat,
      "num_microbatches": self.run.num_microbatches,
      "batch_size": self.run.batch_size,
      "row_length": self.run.data.row_length,
      "parameters": self.parameters,
      "kernels": self.kernels,
      "xla_flags": self.xla_flags,
      "compiled": self.is_compiled,
      "compile_seconds": self.compile_seconds,
      "jax": jax.__version__,
      "fits": self.fits,
      "refusal": self.refusal,
      "memory_bytes": {**memory.parts, "total": memory.total, "limit": memory.limit},
      "memory_margin": memory.margin,
      "memory_model_error": self.model_error,
      "collectives": [
        {**dataclasses.asdict(one), "crosses_islands": one.crosses} for one in self.collectives
      ],
      "flops_per_token": self.flops.as_dict()
      | {"train": self.flops.train, "executed": self.executed_flops},
      "flops_per_step_and_device": times.model_flops,
      "hbm_bytes": {**self.hbm._asdict(), "total": self.hbm.total},
      "seconds": dict(times.times),
      "bound": times.bound,
      "step_seconds": times.step_seconds,
      "step_seconds_nothing_hidden": times.serial_seconds,
      "mfu_ceiling": times.mfu_ceiling,
      "expected_seconds": times.expected_seconds,
      "expected_mfu": times.expected_mfu,
      "program": None if self.program is None else self.program.as_json(),
      "assumed_mfu": mfu,
      "budget": self.budget(mfu, price_per_chip_hour),
    }


def modelled(run: Run, machine: Machine) -> Plan:
  """The plan by the models alone; ValueError where the mesh does not divide the run."""
  mesh = run.mesh.resolved(machine.num_devices)
  _check(run, mesh, machine)
  held = footprint(run, mesh, platform=machine.chip.platform)
  memory = Memory(
    parameters=held.parameters,
    moments=held.moments,
    batch=held.batch,
    gradients=held.gradients,
    activations=held.activations + held.weights,
    code=0.0,
    limit=machine.chip.hbm_bytes,
  )
  return _plan(run, machine, mesh, memory, collectives(run, mesh, machine), is_compiled=False)


def compiled(run: Run, machine: Machine) -> Plan:
  """The plan from the compiled step. A program that needs more memory than the chip has gives a
  plan that does not fit: all it needs beside state, batch and gradients counts as activations."""
  mesh = run.mesh.resolved(machine.num_devices)
  _check(run, mesh, machine)
  held = footprint(run, mesh, platform=machine.chip.platform)
  program = programs.build(run, devices=machine.devices())
  start = time.perf_counter()
  lowered = programs.lower_train_step(program)
  try:
    step = programs.compile_step(program, lowered)
  except jax.errors.JaxRuntimeError as error:
    needed = _needed(str(error))
    if needed is None:
      raise
    memory = _refused(held, needed, machine.chip.hbm_bytes)
    plan = _plan(run, machine, mesh, memory, collectives(run, mesh, machine), is_compiled=True)
    words = " ".join(str(error).split())[:300]
    return dataclasses.replace(plan, refusal=words, compile_seconds=time.perf_counter() - start)
  seconds = time.perf_counter() - start
  memory = _compiled_memory(step, held, machine.chip.hbm_bytes)
  text = step.as_text()
  assert text is not None
  sent = _compiled_transfers(text, program, machine, mesh)
  plan = _plan(run, machine, mesh, memory, sent, is_compiled=True)
  error = (held.total + memory.code) / memory.total - 1.0
  return dataclasses.replace(
    plan,
    program=_program(text, run, machine, sent),
    compile_seconds=seconds,
    model_error=error,
  )


def _program(text: str, run: Run, machine: Machine, sent: tuple[Transfer, ...]) -> ProgramCost:
  return program_cost(
    text,
    chip=machine.chip,
    model=named_kernels(run.model, machine.chip.platform),
    row_length=run.data.row_length,
    num_microbatches=run.num_microbatches,
    tokens_per_device=run.batch_size * run.data.row_length / machine.num_devices,
    transfers=sent,
  )


def _plan(
  run: Run,
  machine: Machine,
  mesh: MeshShape,
  memory: Memory,
  sent: tuple[Transfer, ...],
  *,
  is_compiled: bool,
) -> Plan:
  platform = machine.chip.platform
  flops = flops_per_token(run.model, run.data.row_length)
  executed = executed_flops(run, platform=platform)
  moved = hbm_bytes(run, mesh, chip=machine.chip)
  return Plan(
    run=run,
    machine=machine,
    mesh=mesh,
    kernels=resolved_kernels(run.model, platform),
    xla_flags=run.xla_flags.resolved(machine.chip.key),
    parameters=sum(math.prod(leaf.shape) for leaf in leaves(run.model, platform)),
    memory=memory,
    collectives=sent,
    flops=flops,
    executed_flops=executed.total,
    hbm=moved,
    roofline=roofline(
      flops=flops,
      executed=executed,
      tokens_per_device=run.batch_size * run.data.row_length / machine.num_devices,
      hbm_bytes=moved.total,
      relayout_bytes=moved.relayouts,
      transfers=sent,
      machine=machine,
    ),
    is_compiled=is_compiled,
  )


def _check(run: Run, mesh: MeshShape, machine: Machine) -> None:
  """Raises the errors that building the run on a real mesh would raise."""
  run.optimizer.check(total_steps=run.total_steps)
  if machine.chip.platform == "tpu":
    check_slices(mesh, machine.num_islands)
  programs.check_fits(run, mesh.abstract)


def _compiled_memory(step: jax.stages.Compiled, held: Footprint, limit: float) -> Memory:
  memory = step.memory_analysis()
  assert memory is not None
  new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  inside = memory.temp_size_in_bytes + max(0, new_outputs)
  # What is neither state nor batch among the arguments is a few scalars: rounding to tiles.
  state = held.parameters + held.moments
  batch = max(0.0, memory.argument_size_in_bytes - state)
  # Gradients of a run of one microbatch need not all be there at once.
  gradients = min(held.gradients, float(inside))
  return Memory(
    parameters=held.parameters,
    moments=held.moments,
    batch=batch,
    gradients=gradients,
    activations=inside - gradients,
    code=float(memory.generated_code_size_in_bytes),
    limit=limit,
  )


def _refused(held: Footprint, needed: float, limit: float) -> Memory:
  """As `held`, the rest of what the compiler needs counted as activations."""
  between = held.parameters + held.moments + held.batch
  inside = max(needed, between + held.gradients) - between
  return Memory(
    parameters=held.parameters,
    moments=held.moments,
    batch=held.batch,
    gradients=held.gradients,
    activations=inside - held.gradients,
    code=0.0,
    limit=limit,
  )


def _needed(message: str) -> float | None:
  """The bytes that the compiler wanted and did not find; None for another error."""
  if "RESOURCE_EXHAUSTED" not in message:
    return None
  used = re.search(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT])", message)
  return float(used[1]) * _UNITS[used[2]] if used else None


def _compiled_transfers(
  text: str, program: programs.Program, machine: Machine, mesh: MeshShape
) -> tuple[Transfer, ...]:
  """The collectives of a program, equal ones joined."""
  joined: dict[tuple[Any, ...], tuple[int, float, tuple[int, ...]]] = {}
  for one in compiled_collectives.read(text, program.mesh):
    times = 1 if one.times is None else one.times
    if one.kind == "collective-permute":
      group = max(one.groups, key=lambda pair: machine.islands(pair), default=())
    else:
      group = one.groups[0] if one.groups else ()
    key = (one.kind, one.axes, len(group), machine.islands(group))
    number, size, _ = joined.get(key, (0, 0.0, group))
    joined[key] = (number + times, size + times * one.bytes, group)
  return tuple(
    transfer(kind, axes, group, times=times, num_bytes=size, machine=machine, mesh=mesh)
    for (kind, axes, _, _), (times, size, group) in joined.items()
    if group
  )
