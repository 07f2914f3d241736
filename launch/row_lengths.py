"""Which family is fastest at which row length? Those of configs/comparison.py, on a laptop.

  python -m launch.row_lengths --size=1b --machine=v5p:4 --remat=none --compile \
    --json=docs/row_lengths.jsonl --svg=docs/row_lengths.svg
  python -m launch.row_lengths --size=1b --measure --json=docs/row_lengths.jsonl
  python -m launch.row_lengths --size=1b --machine=v5p:16,v5e:16,h100:8
  python -m launch.row_lengths --size=1b --machine=h100:1 --recorded \
    --json=docs/row_lengths.jsonl --svg=docs/row_lengths_h100.svg

Batches have as many tokens whatever the row length. With --remat all have one layout (fsdp
over all devices, ZeRO stage 3); without, each has its own best (train/planning/search.py), with the
fused kernels. With --compile the real step is compiled for the chip and its time follows from the
program (train/planning/compiled_cost.py: twice, at rates that kernels are known to reach, and by
the compiler's own estimate); otherwise from the planner's models (train/planning/roofline.py).
Nothing is run.

With --measure the steps run on the devices at hand, in one layout as with --remat. All are compiled
first and then timed one after another. Those of the first row length are compiled alone: a compiler
for GPUs chooses algorithms of products by timing them, and remembers what it chose for the others,
of which some are compiled side by side.

With --recorded nothing is compiled or run: the picture is drawn again from what --json holds.
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
from absl import app, flags

from launch import step_times
from launch.console import check_output, parse_flags, refuse, writing
from launch.families import best_layout, compared, with_rows
from launch.overrides import load
from models.flops import count_params
from sharding import machine as machines
from sharding import topology
from sharding.machine import Machine
from sharding.mesh import MeshShape
from train import program as programs
from train.config import Run
from train.drawing import colors
from train.drawing.line_chart import Axis, Line, chart
from train.planning import plan as plans
from train.planning.footprint import resolved_kernels
from train.planning.layouts import REMATS, Layout, layout_of
from train.planning.plan import Plan
from train.program import Program

_SIZE = flags.DEFINE_string("size", "1b", "A published size: 100m ... 14b.")
_MACHINE = flags.DEFINE_list("machine", ["v5p:16"], "CHIP:HOW_MANY, several with commas.")
_ROWS = flags.DEFINE_list("rows", ["2048", "4096", "8192", "16384"], "Row lengths, in tokens.")
_FAMILIES = flags.DEFINE_list(
  "families", ["auto"], "Which, compared to the first; auto: those of configs/comparison.py."
)
_TOKENS = flags.DEFINE_integer(
  "tokens_per_chip", 16384, "Of a batch; at least a row each.", lower_bound=1
)
_REMAT = flags.DEFINE_enum("remat", None, REMATS, "One layout for all, with this remat.")
_LAYERS = flags.DEFINE_enum("layers", "scan", ("scan", "unroll"), "A loop over blocks, or none.")
_COMPILE = flags.DEFINE_bool("compile", False, "Compile each step; needs --remat, and a compiler.")
_MEASURE = flags.DEFINE_bool("measure", False, "Run the steps on the devices at hand.")
_TIMED_STEPS = flags.DEFINE_integer("timed_steps", 8, "With --measure.", lower_bound=1)
_WARMUP_STEPS = 2
_COMPILERS = 4
# What a picture is drawn from.
_KEYS = {"config", "machine", "row_length", "how"}
_JSON = flags.DEFINE_string("json", None, "A file that gets a line for each result.")
_RECORDED = flags.DEFINE_bool("recorded", False, "Draw --svg from --json, and do nothing else.")
_SVG = flags.DEFINE_string("svg", None, "A picture of the last machine, from all in --json.")


def result(plan: Plan) -> dict[str, Any]:
  """What is recorded of a plan. Tokens/s are of all devices."""
  tokens = plan.tokens_per_step
  found: dict[str, Any] = {
    "config": plan.run.name,
    "machine": str(plan.machine),
    "row_length": plan.run.data.row_length,
    "batch_size": plan.run.batch_size,
    "parameters_without_embedding": count_params(plan.run.model).rest,
    **dataclasses.asdict(layout_of(plan.run, plan.machine.num_devices)),
    "kernels": plan.kernels,
    "layers": plan.run.model.layers,
    "memory_margin": plan.memory.margin,
    "how": "model",
    "tokens_per_second": tokens / plan.roofline.expected_seconds,
    "tokens_per_second_bound": tokens / plan.roofline.step_seconds,
    "bound": plan.roofline.bound,
  }
  if (program := plan.program) is not None:
    estimated = program.estimated_seconds
    found |= {
      "how": "compiled",
      "tokens_per_second": tokens / program.expected_seconds,
      "tokens_per_second_estimated": None if estimated is None else tokens / estimated,
      "program": program.as_json(),
      "compile_seconds": plan.compile_seconds,
    }
  return found


def measured(
  program: Program, compiled: jax.stages.Compiled, compile_seconds: float, *, steps: int
) -> dict[str, Any]:
  """What is recorded of a step that ran here. Tokens/s are of all devices."""
  run = program.run
  timed = step_times.run_steps(program, compiled, warmup=_WARMUP_STEPS, steps=steps)
  return {
    "config": run.name,
    "machine": machine_here(),
    "row_length": run.data.row_length,
    "batch_size": run.batch_size,
    "parameters_without_embedding": count_params(run.model).rest,
    **dataclasses.asdict(layout_of(run, program.mesh.size)),
    "layers": run.model.layers,
    "kernels": resolved_kernels(run.model, program.platform),
    "how": "measured",
    **step_times.speed(program, compiled, timed),
    "compile_seconds": compile_seconds,
    "device": program.mesh.devices.flat[0].device_kind,
  }


def machine_here() -> str:
  """The devices at hand, as machines that are planned for are called."""
  kind, count = jax.devices()[0].device_kind, len(jax.devices())
  chip = topology.chip_of(kind)
  if chip is None or chip.platform != "gpu":
    return f"{count} x {kind}"
  return str(machines.of_chips(chip.key, count))


def _family(result: dict[str, Any]) -> str:
  return result["config"].rpartition("-")[0]


def picture(results: list[dict[str, Any]], title: str) -> str:
  """Tokens/s over row length as SVG, a line for each family: measured where anything was, with
  faint lines for what is compiled; else of compiled steps where there are any, with dots for the
  compiler's own estimate and faint lines for the model."""
  ways = {one["how"] for one in results}
  lines = []
  for family in dict.fromkeys(_family(one) for one in results):
    color = colors.of_family(family).color
    of_family = [one for one in results if _family(one) == family]

    def line(
      how: str,
      name: str,
      style: Literal["line", "faint", "dots"] = "line",
      *,
      key: str = "tokens_per_second",
      of_family: Any = of_family,
      color: str = color,
    ) -> Line:
      # Of equal ones the last counts.
      found = {one["row_length"]: one.get(key) for one in of_family if one["how"] == how}
      points = [(float(row), found[row]) for row in sorted(found) if found[row] is not None]
      return Line(points, color, "" if style == "faint" else name, f"{name}, {how}", style)

    if "measured" in ways:
      lines += [line("compiled", family, "faint"), line("measured", family)]
    elif "compiled" in ways:
      estimated = "tokens_per_second_estimated"
      lines += [
        line("model", family, "faint"),
        line("compiled", family),
        line("compiled", f"{family}, compiler's", "dots", key=estimated),
      ]
    else:
      lines.append(line("model", family))
  rows = sorted({one["row_length"] for one in results})
  x = Axis("tokens in a row", scale="log", show="{:,.0f}".format, at=rows)
  drawn = chart(
    lines,
    title=f"Tokens per second over row length: {title}",
    x=x,
    y=Axis("tokens per second", exact="{:,.0f}".format, low=0.0),
    width=720,
    height=370,
  )
  if drawn is None:
    raise ValueError(f"row_lengths: --svg: there is no result of {title} to draw; see --json")
  return drawn.svg()


def main(argv: list[str]) -> None:
  try:
    if len(argv) > 1:
      raise ValueError(f"row_lengths: {argv[1]!r} is no flag of this command; see --help")
    for name in ("json", "svg"):
      check_output(name)
    _check_lists()
    _recorded()
    if _MEASURE.value:
      _measure()
      return
    jax.config.update("jax_platforms", "cpu")
    if _RECORDED.value:
      if _JSON.value is None or _SVG.value is None:
        raise ValueError("row_lengths: --recorded draws --svg from --json: name both files")
      _draw(str(_machine(_MACHINE.value[-1])), [])
      return
    for name in _MACHINE.value:
      _compare(name)
  except ValueError as error:
    refuse(error)


def _check_lists() -> None:
  """Raises where there would be nothing to compare."""
  for flag in (_MACHINE, _ROWS, _FAMILIES):
    if not flag.value:
      raise ValueError(f"row_lengths: --{flag.name} is empty; leave it out, or name at least one")
  for row in _ROWS.value:
    if not row.isdecimal() or int(row) < 1:
      raise ValueError(f"row_lengths: --rows: {row!r} is no row length; at least 1, as 2048,4096")
  known = compared()
  for family in _families():
    if family not in known:
      raise ValueError(f"row_lengths: --families: {family!r} is none of {', '.join(known)}")


def _families() -> Sequence[str]:
  """Those that are asked for."""
  return compared() if _FAMILIES.value == ["auto"] else _FAMILIES.value


def _machine(name: str) -> Machine:
  chip, _, count = name.partition(":")
  if not count.isdecimal():
    raise ValueError(f"row_lengths: machine {name!r} is not CHIP:HOW_MANY, such as v5p:16")
  return machines.of_chips(chip, int(count))


def _compare(name: str) -> None:
  machine = _machine(name)
  if _COMPILE.value and (_REMAT.value is None or machine.uncompilable is not None):
    why = machine.uncompilable or "--remat is missing"
    raise ValueError(f"row_lengths: --compile needs --remat and a compiler for {machine}: {why}")
  results = []
  print(f"{machine}, {_SIZE.value}: tokens/s on all chips, and over the first's")
  for row_length in map(int, _ROWS.value):
    found = []
    for family in _families():
      both = _plans(family, machine, row_length)
      found.append([result(plan) for plan in both])
      _record(found[-1])
    for each in zip(*found):
      _tell(each)
      results += each
  _draw(str(machine), results)


def _measure() -> None:
  """Compiles all steps, then times each."""
  rows, families = [int(row) for row in _ROWS.value], _families()
  devices = len(jax.devices())

  def compiled(row_length: int, family: str) -> tuple[Program, jax.stages.Compiled, float]:
    run = _run(family, num_devices=devices, row_length=row_length)
    program = programs.build(_one_layout(run, devices, _REMAT.value or "none"))
    lowered = programs.lower_train_step(program)
    start = time.perf_counter()
    return program, programs.compile_step(program, lowered), time.perf_counter() - start

  steps = [compiled(rows[0], family) for family in families]
  with ThreadPoolExecutor(_COMPILERS) as pool:
    steps += pool.map(lambda each: compiled(*each), itertools.product(rows[1:], families))
  print(f"{machine_here()}, {_SIZE.value}: tokens/s on all devices, and over the first's")
  results = []
  for first in range(0, len(steps), len(families)):
    found = []
    for each in steps[first : first + len(families)]:
      found.append(measured(*each, steps=_TIMED_STEPS.value))
      _record(found[-1:])
    _tell(found)
    results += found
  _draw(machine_here(), results)


def _draw(machine: str, results: list[dict[str, Any]]) -> None:
  results = _recorded() or results
  if _SVG.value is not None:
    wanted = [
      one
      for one in results
      if one["machine"] == machine and one["config"].endswith(f"-{_SIZE.value}")
    ]
    drawn = picture(wanted, f"{_SIZE.value} on {machine}")
    path = pathlib.Path(_SVG.value)
    with writing(path):
      path.write_text(drawn + "\n", encoding="utf-8")


def _recorded() -> list[dict[str, Any]]:
  """The results in the file of --json; ValueError for a line that is none: nothing is added to a
  file of something else."""
  path = pathlib.Path(_JSON.value or "")
  lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
  results = []
  for number, line in enumerate(lines, start=1):
    try:
      one = json.loads(line)
    except ValueError:
      one = None
    if not (isinstance(one, dict) and one.keys() >= _KEYS):
      raise ValueError(
        f"row_lengths: --json={path}: line {number} is no result of this command: name another file"
      )
    results.append(one)
  return results


def _record(results: list[dict[str, Any]]) -> None:
  """A line for each, at once: a compilation takes minutes."""
  if _JSON.value is None:
    return
  command = "python -m launch.row_lengths " + " ".join(map(shlex.quote, sys.argv[1:]))
  versions = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "command": command}
  path = pathlib.Path(_JSON.value)
  with writing(path), path.open("a", encoding="utf-8") as file:
    file.writelines(json.dumps(one | versions) + "\n" for one in results)


def _run(family: str, *, num_devices: int, row_length: int) -> Run:
  """The preset on rows of this length, its blocks in a loop or unrolled."""
  run = load(f"configs/{family}.py:{_SIZE.value}")
  run = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=_LAYERS.value))
  return with_rows(
    run, num_devices=num_devices, row_length=row_length, tokens_per_chip=_TOKENS.value
  )


def _plans(family: str, machine: Machine, row_length: int) -> list[Plan]:
  """By the model, and compiled if that is asked for."""
  run = _run(family, num_devices=machine.num_devices, row_length=row_length)
  if _REMAT.value is None:
    run = best_layout(run, machine).of(run)
  else:
    run = _one_layout(run, machine.num_devices, _REMAT.value)
  return [plans.modelled(run, machine), *([plans.compiled(run, machine)] if _COMPILE.value else [])]


def _one_layout(run: Run, num_devices: int, remat: str) -> Run:
  mesh, kept = MeshShape(fsdp=num_devices), REMATS[REMATS.index(remat)]
  return Layout(mesh=mesh, zero_stage=3, remat=kept, num_microbatches=1).of(run)


def _tell(found: Sequence[dict[str, Any]]) -> None:
  """A line for one row length: every family's tokens/s, and over the first's."""
  for key in ("tokens_per_second", "tokens_per_second_estimated"):
    if found[0].get(key) is None:
      continue
    cells = [
      f"{family} {one[key]:,.0f} ({one[key] / found[0][key]:.2f})"
      for family, one in zip(_families(), found)
    ]
    how = found[0]["how"] if key == "tokens_per_second" else "compiler's estimate"
    print(f"  rows of {found[0]['row_length']:>6}, {how}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
