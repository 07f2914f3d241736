"""A plan as lines of text."""

import shlex
from collections.abc import Iterable, Sequence

from launch.overrides import said
from sharding.mesh import AXES
from train.config import Run
from train.planning.layouts import Layout
from train.planning.plan import Plan

MEMORY = {
  "parameters": "parameters",
  "moments": "optimizer moments",
  "batch": "batch",
  "gradients": "gradients",
  "activations": "activations, temporaries",
  "code": "program",
}
RESOURCES = {"compute": "matrix units"}


def plan_lines(plan: Plan, *, mfu: float | None, price: float | None) -> list[str]:
  """The whole report."""
  return [
    verdict(plan),
    *header(plan),
    "",
    *_memory(plan),
    "",
    *_collectives(plan),
    "",
    *_flops(plan),
    "",
    *_roofline(plan),
    *_program(plan),
    "",
    *budget(plan, mfu, price),
  ]


def verdict(plan: Plan) -> str:
  """Fits or not, in one sentence."""
  memory = plan.memory
  where = f"{plan.run.name} on {plan.machine}"
  if plan.fits:
    return (
      f"FITS: {where}: {gigabytes(memory.total)} of {gigabytes(memory.limit)} GB on each device, "
      f"{memory.margin:.0%} left"
    )
  return (
    f"DOES NOT FIT: {where}: {gigabytes(memory.total)} GB needed, "
    f"{gigabytes(memory.limit)} GB there on each device"
  )


def source(plan: Plan) -> str:
  """Where the numbers come from."""
  if plan.refusal:
    return f"compiled, refused after {plan.compile_seconds:.0f} s: {plan.refusal}"
  if plan.is_compiled:
    return (
      f"compiled for {plan.chip.name} in {plan.compile_seconds:.0f} s; the memory model alone "
      f"would have said {plan.model_error:+.0%}"
    )
  if plan.machine.uncompilable is None:
    return "by the model; not compiled"
  return f"by the model; not compiled: {plan.machine.uncompilable}"


def mesh_words(plan: Plan) -> str:
  """data 2 x fsdp 8, without axes of size 1."""
  sizes = {"data": plan.mesh.data, "fsdp": plan.mesh.fsdp}
  sizes |= {"sequence": plan.mesh.sequence, "tensor": plan.mesh.tensor}
  return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def layout_flags(layout: Layout) -> str:
  """The flags with which a command runs in this layout."""
  mesh = layout.mesh
  axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, mesh.sizes) if size > 1]
  # A preset's own -1 would take the devices that the other axes leave.
  if mesh.fsdp == 1:
    axes.append("--config.mesh.fsdp=1")
  return " ".join(
    [
      *axes,
      f"--config.zero_stage={layout.zero_stage}",
      f"--config.model.remat={layout.remat}",
      f"--config.num_microbatches={layout.num_microbatches}",
    ]
  )


def train_command(run: Run, layout: Layout, argv: Sequence[str]) -> str:
  """The shell command that trains `run` in `layout`, with the overrides of the command `argv` but
  for those of its layout."""
  spec, overrides = said(argv)
  words = ["python", "-m", "launch.train", f"--config={spec}", f"--workdir=runs/{run.name}"]
  words += [flag for path, flag in overrides.items() if not _is_layout(path)]
  return f"{shlex.join(words)} {layout_flags(layout)}"


def plan_command(argv: Sequence[str]) -> str:
  """The command `argv` without the flags that say where its results go."""
  words, rest = [], iter(argv[1:])
  for word in rest:
    if word in ("--json", "--html"):
      next(rest)
    elif not word.startswith(("--json=", "--html=")):
      words.append(word)
  return shlex.join(["python", "-m", "launch.plan", *words])


def short(plan: Plan) -> str:
  """Layout, memory and time on a line."""
  run, times = plan.run, plan.roofline
  how = "compiled" if plan.is_compiled else "by the model"
  fits = "" if plan.fits else "DOES NOT FIT, "
  return (
    f"{mesh_words(plan)}, ZeRO {run.zero_stage}, remat {run.model.remat}, "
    f"{parts(run.num_microbatches)}: {fits}{gigabytes(plan.memory.total)} GB, step "
    f"{1e3 * times.step_seconds:,.0f} to {1e3 * times.serial_seconds:,.0f} ms, "
    f"{times.bound} binds, MFU at most {times.mfu_ceiling:.0%} ({how})"
  )


def gigabytes(number: float) -> str:
  return f"{number / 1e9:,.0f}" if number >= 1e11 else f"{number / 1e9:.2f}"


def parts(number: int) -> str:
  """1 microbatch, 2 microbatches."""
  return f"{number} microbatch{'es' if number > 1 else ''}"


def header(plan: Plan) -> Iterable[str]:
  run = plan.run
  rows = run.batch_size // run.num_microbatches
  yield (
    f"  {plan.parameters / 1e9:.3f}B parameters; mesh {mesh_words(plan)}, ZeRO stage "
    f"{run.zero_stage}, remat {run.model.remat}, {parts(run.num_microbatches)} of {rows} x "
    f"{run.data.row_length} tokens"
  )
  kernels = ", ".join(f"{name} {which}" for name, which in plan.kernels.items())
  yield f"  kernels: {kernels}"
  flags = ", ".join(f"{name}={value}" for name, value in plan.xla_flags.items()) or "none"
  yield f"  XLA flags: {flags}"
  yield f"  {source(plan)}"


def _is_layout(path: str) -> bool:
  """Whether layout_flags sets this field of a run."""
  return path.startswith("mesh.") or path in ("zero_stage", "model.remat", "num_microbatches")


def _memory(plan: Plan) -> Iterable[str]:
  memory = plan.memory
  yield "memory of each device              GB"
  for name, size in memory.parts.items():
    yield f"  {MEMORY[name]:<26}{gigabytes(size):>9}  {size / memory.limit:>5.1%}"
  yield f"  {'total':<26}{gigabytes(memory.total):>9}  {memory.total / memory.limit:>5.1%}"
  yield f"  {plan.chip.name + ' has':<26}{gigabytes(memory.limit):>9}"


def _collectives(plan: Plan) -> Iterable[str]:
  if not plan.collectives:
    yield "collectives: none"
    return
  across = "slices" if plan.chip.platform == "tpu" else "nodes"
  yield f"collectives of a step       axes              times        GB       ms  crosses {across}"
  for one in sorted(plan.collectives, key=lambda one: -one.bytes):
    seconds = one.link_seconds + one.network_seconds
    yield (
      f"  {one.kind:<26}{'+'.join(one.axes):<16}{one.times:>7}{gigabytes(one.bytes):>10}"
      f"{1e3 * seconds:>9.1f}  {'yes' if one.crosses else 'no'}"
    )


def _flops(plan: Plan) -> Iterable[str]:
  flops = plan.flops
  tokens = plan.tokens_per_step / plan.machine.num_devices
  yield "FLOPs, forward, of a token         G  share    of a step and device, with backward      T"
  for part in flops.counted:
    yield (
      f"  {part.words:<26}{part.flops / 1e9:>9.3f}  {part.flops / flops.forward:>5.1%}"
      f"{3 * part.flops * tokens / 1e12:>43.2f}"
    )
  yield (f"  {'total':<26}{flops.forward / 1e9:>9.3f}  {'':>5}{flops.train * tokens / 1e12:>43.2f}")
  yield f"  {'with recomputation':<26}{'':>9}  {'':>5}{plan.executed_flops * tokens / 1e12:>43.2f}"


def _roofline(plan: Plan) -> Iterable[str]:
  times = plan.roofline
  yield "roofline of a step: at least       ms"
  links = "NVLink" if plan.chip.platform == "gpu" else "ICI"
  for name, seconds in times.times.items():
    words = links if name == "ICI" else RESOURCES.get(name, name)
    mark = "  <- binds" if name == times.bound else ""
    yield f"  {words:<26}{1e3 * seconds:>9.1f}{mark}"
  yield f"  {ceiling(plan)}"
  yield f"  {expected(plan)}"


def _program(plan: Plan) -> Iterable[str]:
  program = plan.program
  if program is None:
    return
  yield ""
  yield "the compiled step by part    TFLOP        GB       ms  compiler's estimate, ms"
  rows = sorted(program.parts.items(), key=lambda item: -item[1].seconds)
  for name, part in [*rows, ("total", program.total)]:
    estimate = f"{1e3 * part.estimated:>9.1f}" if program.has_estimates else ""
    yield (
      f"  {name:<22}{part.flops / 1e12:>9.2f}{gigabytes(part.bytes):>10}{1e3 * part.seconds:>9.1f}"
      f"{estimate}"
    )


def ceiling(plan: Plan) -> str:
  """The best case, and the case in which nothing overlaps."""
  times = plan.roofline
  return (
    f"MFU ceiling {times.mfu_ceiling:.1%} if all else hides behind what binds; "
    f"{times.model_flops / times.serial_seconds / times.peak_flops:.1%} if nothing hides"
  )


def expected(plan: Plan) -> str:
  """The expected time of a step, with kernels at the rates in sharding/topology.py."""
  times = plan.roofline
  return (
    f"expected {1e3 * times.expected_seconds:,.1f} ms, MFU {times.expected_mfu:.1%}: half of what "
    "can hide hidden, kernels at the shares of their peaks that are known (sharding/topology.py)"
  )


def budget(plan: Plan, mfu: float | None, price: float | None) -> Iterable[str]:
  whole = plan.budget(mfu, price)
  pace = f"at MFU {mfu:.0%}" if mfu else "at the ceiling, so at best"
  yield (
    f"{whole['tokens'] / 1e9:.4g}B tokens {pace}: {whole['tokens_per_day'] / 1e9:.4g}B tokens a "
    f"day, {whole['days']:.3g} days, {whole['chip_hours']:,.0f} chip-hours"
  )
  if "cost" in whole:
    yield f"cost at {price:g} per chip-hour: {whole['cost']:,.0f}"
