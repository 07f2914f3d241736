"""How far the roofline's expectation is from steps that others have timed and published.

  python -m launch.published --record=docs/published.jsonl

Nobody has published times of our programs, so the nearest preset stands for each model: what
differs (attention with more key-value heads, vocabulary, optimizer) is in the error. Layouts are
the best by the models (train/planning/search.py), with the fused kernels. Nothing is compiled or
run.
"""

import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags

from launch.console import check_output, parse_flags, refuse, writing
from launch.families import best_layout, with_rows
from launch.overrides import load
from sharding import machine as machines
from train.planning import plan as plans
from train.planning.plan import Plan

_RECORD = flags.DEFINE_string("record", None, "A file that is written, a line each.")


class Utilisation(NamedTuple):
  """A published MFU, and the preset and machine that are nearest to it."""

  what: str
  mfu: float
  config: str
  chip: str
  chips: int
  row_length: int
  tokens_per_chip: int
  source: str


class StepTimes(NamedTuple):
  """Published times of steps of as many tokens, over that of the Transformer on rows of 2048."""

  config: str
  times: dict[int, float]


_MAXTEXT = "github.com/AI-Hypercomputer/maxtext, docs/reference/models/tiering.md"
_SEQAX = "github.com/MatX-inc/seqax, README.md"
UTILISATIONS = (
  Utilisation("84M, 8 A100", 0.14, "100m", "a100-80gb", 8, 2048, 16384, _SEQAX),
  Utilisation("270M, 8 A100", 0.24, "200m", "a100-80gb", 8, 2048, 16384, _SEQAX),
  Utilisation("540M, 8 A100", 0.35, "400m", "a100-80gb", 8, 2048, 16384, _SEQAX),
  Utilisation("1B, 8 A100", 0.416, "1b", "a100-80gb", 8, 2048, 16384, _SEQAX),
  Utilisation("2B, 8 A100", 0.507, "3b", "a100-80gb", 8, 2048, 16384, _SEQAX),
  Utilisation(
    "Llama 2 7B, 8 H100", 0.50, "7b", "h100", 8, 4096, 16384,
    "github.com/AI-Hypercomputer/maxtext, configs/gpu/a3/llama_2_7b (492 TFLOP/s)",
  ),
  Utilisation(
    "16B, v5e-256", 0.611, "14b", "v5e", 256, 2048, 8192,
    "github.com/AI-Hypercomputer/maxtext, configs/tpu/v5e/README.md",
  ),
  Utilisation("Llama 3.1 8B, v6e-256", 0.4546, "7b", "v6e", 256, 8192, 24576, _MAXTEXT),
  Utilisation("Llama 2 70B, v5p-512", 0.654, "14b", "v5p", 512, 4096, 16384, _MAXTEXT),
)  # fmt: skip
# arXiv:2402.19427, figure 3: TPU v3, the labels of its bars (which label belongs to which length
# is by their order); the one of the Transformer of 1B at 8192 could not be read.
_FIGURE = "arXiv:2402.19427, figure 3"
_STEP_TIMES = (
  StepTimes("transformer.py:400m", {2048: 1.00, 4096: 1.17, 8192: 1.46}),
  StepTimes("griffin.py:400m", {2048: 0.93, 4096: 0.96, 8192: 0.98}),
  StepTimes("transformer.py:1b", {2048: 1.00, 4096: 1.12}),
  StepTimes("griffin.py:1b", {2048: 0.97, 4096: 0.99, 8192: 1.01}),
)


def _plan(config: str, chip: str, chips: int, *, row_length: int, tokens_per_chip: int) -> Plan:
  machine = machines.of_chips(chip, chips)
  run = load(f"configs/{config}")
  tokens = max(tokens_per_chip, row_length // machine.num_devices)
  devices = machine.num_devices
  run = with_rows(run, num_devices=devices, row_length=row_length, tokens_per_chip=tokens)
  return plans.modelled(best_layout(run, machine).of(run), machine)


def utilisations(which: Sequence[Utilisation] = UTILISATIONS) -> list[dict[str, Any]]:
  """Published MFU, the ceiling and what is expected."""
  found = []
  for one in which:
    plan = _plan(
      f"transformer.py:{one.config}",
      one.chip,
      one.chips,
      row_length=one.row_length,
      tokens_per_chip=one.tokens_per_chip,
    )
    found.append(
      {
        **one._asdict(),
        "published": one.mfu,
        "expected": plan.roofline.expected_mfu,
        "ceiling": plan.roofline.mfu_ceiling,
      }
    )
  return found


def step_times() -> list[dict[str, Any]]:
  """Published and expected times of a step over the Transformer's on rows of 2048."""
  found, base = [], {}
  for one in _STEP_TIMES:
    size = one.config.partition(":")[2]
    for row_length, published in one.times.items():
      plan = _plan(one.config, "v3", 64, row_length=row_length, tokens_per_chip=8192)
      seconds = plan.roofline.expected_seconds
      base.setdefault(size, seconds)  # the Transformer at 2048 comes first
      found.append(
        {
          "what": f"{plan.run.name}, rows of {row_length}, TPU v3",
          "published": published,
          "expected": seconds / base[size],
          "source": _FIGURE,
        }
      )
  return found


def main(argv: list[str]) -> None:
  try:
    if len(argv) > 1:
      raise ValueError(f"published: {argv[1]!r} is no flag of this command; see --help")
    check_output("record")
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for title, found in (("MFU", utilisations()), ("time of a step", step_times())):
      print(f"{title:<40}published  expected   error")
      for one in found:
        error = one["expected"] / one["published"] - 1
        rows.append({"kind": title, **one, "error": error})
        print(f"  {one['what']:<38}{one['published']:>9.3f}{one['expected']:>10.3f}{error:>+8.0%}")
  except ValueError as error:
    refuse(error)
  if _RECORD.value is not None:
    command = "python -m launch.published " + " ".join(map(shlex.quote, sys.argv[1:]))
    date = datetime.date.today().isoformat()
    lines = [json.dumps({**row, "date": date, "command": command}) + "\n" for row in rows]
    path = pathlib.Path(_RECORD.value)
    with writing(path):
      path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
