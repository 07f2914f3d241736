"""Which family is fastest at which row length? Griffin, Hawk and the Transformer, on a laptop.

  python -m launch.row_lengths --size=1b --machine=v5p:4 --remat=none --compile \
    --json=docs/row_lengths.jsonl --svg=docs/row_lengths.svg
  python -m launch.row_lengths --size=1b --machine=v5p:16,v5e:16,h100:8

Batches have as many tokens whatever the row length. With --remat all three have one layout (fsdp
over all devices, ZeRO stage 3); without, each has its own best (train/search.py), with the fused
kernels. With --compile the real step is compiled for the chip and its time follows from the program
(train/compiled_cost.py: twice, at rates that kernels are known to reach, and by the compiler's own
estimate); otherwise from the planner's models (train/roofline.py). Nothing is run.
"""

import dataclasses
import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

from launch import line_chart, svg
from launch.families import FAMILIES, best_layout, with_rows
from launch.overrides import load, refuse
from models.flops import count_params
from sharding import machine as machines
from sharding.machine import Machine
from sharding.mesh import MeshShape
from train import plan as plans
from train.layouts import REMATS, Layout, layout_of
from train.plan import Plan

_SIZE = flags.DEFINE_string("size", "1b", "A published size: 100m ... 14b.")
_MACHINE = flags.DEFINE_list("machine", ["v5p:16"], "CHIP:HOW_MANY, several with commas.")
_ROWS = flags.DEFINE_list("rows", ["2048", "4096", "8192", "16384"], "Row lengths, in tokens.")
_FAMILIES = flags.DEFINE_list("families", list(FAMILIES), "Which, compared to the first.")
_TOKENS = flags.DEFINE_integer(
  "tokens_per_chip", 16384, "Of a batch; at least a row each.", lower_bound=1
)
_REMAT = flags.DEFINE_enum("remat", None, REMATS, "One layout for all, with this remat.")
_COMPILE = flags.DEFINE_bool("compile", False, "Compile each step; needs --remat, and a compiler.")
_JSON = flags.DEFINE_string("json", None, "A file that gets a line for each result.")
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


def picture(results: list[dict[str, Any]], title: str) -> str:
  """Tokens/s over row length, a line for each family: of compiled steps where there are any, with
  dots for the compiler's own estimate and faint lines for the model."""
  are_compiled = any(one["how"] == "compiled" for one in results)
  lines = []
  for family, color in zip(FAMILIES, svg.COLORS):
    of_family = [one for one in results if one["config"].startswith(family)]

    def points(how: str, key: str, of_family: Any = of_family) -> list[tuple[float, float]]:
      # Of equal ones the last counts.
      found = {one["row_length"]: one.get(key) for one in of_family if one["how"] == how}
      return [(float(row), found[row]) for row in sorted(found) if found[row] is not None]

    model = points("model", "tokens_per_second")
    if not are_compiled:
      lines.append(line_chart.Line(model, color, label=family))
      continue
    estimates = points("compiled", "tokens_per_second_estimated")
    lines += [
      line_chart.Line(model, color, style="faint"),
      line_chart.Line(points("compiled", "tokens_per_second"), color, label=family),
      line_chart.Line(estimates, color, label=f"{family}, compiler's", style="dots"),
    ]
  return line_chart.chart(
    lines,
    x=line_chart.Axis(
      label=f"tokens/s over tokens in a row: {title}",
      scale="log",
      show=lambda x: f"{x:,.0f}",
      at=sorted({one["row_length"] for one in results}),
    ),
    y=line_chart.Axis(low=0.0),
    width=680,
    height=340,
    room=150.0,
  )


def main(argv: list[str]) -> None:
  try:
    if len(argv) > 1:
      raise ValueError(f"row_lengths: {argv[1]!r} is no flag of this command; see --help")
    jax.config.update("jax_platforms", "cpu")
    for name in _MACHINE.value:
      _compare(name)
  except (ValueError, FileNotFoundError) as error:
    refuse(error)


def _compare(name: str) -> None:
  chip, _, count = name.partition(":")
  if not count.isdecimal():
    raise ValueError(f"row_lengths: machine {name!r} is not CHIP:HOW_MANY, such as v5p:16")
  machine = machines.of_chips(chip, int(count))
  if _COMPILE.value and (_REMAT.value is None or machine.uncompilable is not None):
    why = machine.uncompilable or "--remat is missing"
    raise ValueError(f"row_lengths: --compile needs --remat and a compiler for {machine}: {why}")
  results = []
  print(f"{machine}, {_SIZE.value}: tokens/s on all chips, and over the first's")
  for row_length in map(int, _ROWS.value):
    found = []
    for family in _FAMILIES.value:
      both = _plans(f"configs/{family}.py:{_SIZE.value}", machine, row_length)
      found.append([result(plan) for plan in both])
      _record(found[-1])
    for each in zip(*found):
      _tell(each)
      results += each
  if _JSON.value is not None:
    text = pathlib.Path(_JSON.value).read_text(encoding="utf-8")
    results = [json.loads(line) for line in text.splitlines()]
  if _SVG.value is not None:
    wanted = [
      one
      for one in results
      if one["machine"] == str(machine) and one["config"].endswith(f"-{_SIZE.value}")
    ]
    drawn = picture(wanted, f"{_SIZE.value} on {machine}")
    pathlib.Path(_SVG.value).write_text(drawn + "\n", encoding="utf-8")


def _record(results: list[dict[str, Any]]) -> None:
  """A line for each, at once: a compilation takes minutes."""
  if _JSON.value is None:
    return
  command = "python -m launch.row_lengths " + " ".join(map(shlex.quote, sys.argv[1:]))
  versions = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "command": command}
  with pathlib.Path(_JSON.value).open("a", encoding="utf-8") as file:
    file.writelines(json.dumps(one | versions) + "\n" for one in results)


def _plans(config: str, machine: Machine, row_length: int) -> list[Plan]:
  """By the model, and compiled if that is asked for."""
  tokens = _TOKENS.value
  run = with_rows(load(config), machine, row_length=row_length, tokens_per_chip=tokens)
  if _REMAT.value is None:
    layout = best_layout(run, machine)
  else:
    mesh = MeshShape(fsdp=machine.num_devices)
    layout = Layout(
      mesh=mesh, zero_stage=3, remat=REMATS[REMATS.index(_REMAT.value)], num_microbatches=1
    )
  run = layout.of(run)
  return [plans.modelled(run, machine), *([plans.compiled(run, machine)] if _COMPILE.value else [])]


def _tell(found: Sequence[dict[str, Any]]) -> None:
  """A line for one row length: every family's tokens/s, and over the first's."""
  for key in ("tokens_per_second", "tokens_per_second_estimated"):
    if found[0].get(key) is None:
      continue
    cells = [
      f"{family} {one[key]:,.0f} ({one[key] / found[0][key]:.2f})"
      for family, one in zip(_FAMILIES.value, found)
    ]
    how = found[0]["how"] if key == "tokens_per_second" else "compiler's estimate"
    print(f"  rows of {found[0]['row_length']:>6}, {how}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
  app.run(main)
