"""Which family is fastest at which row length? By the planner's models, so in seconds on a laptop.

  python -m launch.row_lengths --size=1b --machine=v5p:16,v5e:16,h100:8 \
    --json=docs/row_lengths.jsonl --svg=docs/row_lengths.svg

Griffin, Hawk and the Transformer, each in its own best layout (train/search.py) and with the fused
kernels, on batches of as many tokens whatever the row length. Nothing is compiled or run: a step is
taken to last half way between everything hidden behind what takes longest and nothing hidden
(train/roofline.py), matrix products, those of attention too, at the chip's peak.
"""

import dataclasses
import datetime
import json
import pathlib
import shlex
import sys
from typing import Any

import jax
from absl import app, flags

from launch import line_chart, svg
from launch.overrides import load, refuse
from models.flops import count_params
from sharding import machine as machines
from sharding.machine import Machine
from train.activations import Kernels
from train.config import Run
from train.search import SAFE_MARGIN, search

FAMILIES = ("transformer", "hawk", "griffin")

_SIZE = flags.DEFINE_string("size", "1b", "A published size: 100m ... 14b.")
_MACHINE = flags.DEFINE_list("machine", ["v5p:16"], "CHIP:HOW_MANY, several with commas.")
_ROWS = flags.DEFINE_list("rows", ["2048", "4096", "8192", "16384"], "Row lengths, in tokens.")
_TOKENS = flags.DEFINE_integer(
  "tokens_per_chip", 16384, "Of a batch; at least a row each.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "A file that gets a line for each result.")
_SVG = flags.DEFINE_string("svg", None, "A picture of the last machine.")


def result(run: Run, machine: Machine, *, row_length: int, tokens_per_chip: int) -> dict[str, Any]:
  """The best layout of `run` at that row length, and its tokens/s on all devices by the model."""
  rows, rest = divmod(tokens_per_chip * machine.num_devices, row_length)
  if rest or not rows:
    raise ValueError(
      f"row_lengths: {tokens_per_chip} tokens for each of {machine.num_devices} chips are no whole "
      f"number of rows of {row_length}; change --tokens_per_chip or --rows"
    )
  data = dataclasses.replace(run.data, row_length=row_length)
  run = dataclasses.replace(run, batch_size=rows, data=data)
  found = search(run, machine)
  if not found or found[0].margin < SAFE_MARGIN:
    raise ValueError(
      f"row_lengths: no layout of {run.name} with {rows} rows of {row_length} fits "
      f"{machine}; use more chips or fewer --tokens_per_chip"
    )
  best = found[0]
  return {
    "config": run.name,
    "machine": str(machine),
    "row_length": row_length,
    "batch_size": rows,
    "parameters_without_embedding": count_params(run.model).rest,
    "tokens_per_second": rows * row_length / best.roofline.expected_seconds,
    "mfu_ceiling": best.roofline.mfu_ceiling,
    "bound": best.roofline.bound,
    "memory_margin": best.margin,
    **dataclasses.asdict(best.layout),
  }


def with_fused_kernels(run: Run, platform: str) -> Run:
  """`run` with the kernels that are the default on a TPU, and by name only on a GPU."""
  if platform != "gpu":
    return run
  return dataclasses.replace(run, model=Kernels("pallas_gpu", "pallas_gpu", "einsum").of(run.model))


def picture(results: list[dict[str, Any]], title: str) -> str:
  """Tokens/s over row length, a line for each family."""
  colors = dict(zip(FAMILIES, svg.COLORS))
  lines = []
  for family in FAMILIES:
    points = [
      (float(one["row_length"]), one["tokens_per_second"])
      for one in results
      if one["config"].startswith(family)
    ]
    lines.append(line_chart.Line(points, colors[family], label=family))
  return line_chart.chart(
    lines,
    x=line_chart.Axis(
      label=f"tokens/s over tokens in a row: {title}",
      scale="log",
      show=lambda x: f"{x:,.0f}",
      at=sorted({one["row_length"] for one in results}),
    ),
    y=line_chart.Axis(low=0.0),
    width=640,
    height=320,
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
  command = "python -m launch.row_lengths " + " ".join(map(shlex.quote, sys.argv[1:]))
  runs = [
    with_fused_kernels(load(f"configs/{family}.py:{_SIZE.value}"), machine.chip.platform)
    for family in FAMILIES
  ]
  results = []
  print(f"{machine}, {_SIZE.value}: tokens/s on all chips by the model, and over the transformer's")
  for row_length in map(int, _ROWS.value):
    each = [
      result(run, machine, row_length=row_length, tokens_per_chip=_TOKENS.value) for run in runs
    ]
    base = each[0]["tokens_per_second"]
    cells = [
      f"{family} {one['tokens_per_second']:,.0f} ({one['tokens_per_second'] / base:.2f})"
      for family, one in zip(FAMILIES, each)
    ]
    print(f"  rows of {row_length:>6}: " + ", ".join(cells))
    results += each
  if _JSON.value is not None:
    date = datetime.date.today().isoformat()
    with pathlib.Path(_JSON.value).open("a", encoding="utf-8") as file:
      for one in results:
        file.write(json.dumps({**one, "date": date, "command": command}) + "\n")
  if _SVG.value is not None:
    pathlib.Path(_SVG.value).write_text(
      picture(results, f"{_SIZE.value} on {machine}, by the model") + "\n"
    )


if __name__ == "__main__":
  app.run(main)
