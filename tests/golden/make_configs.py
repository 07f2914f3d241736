"""Writes tests/golden/configs.txt, every setting of every shipped config, one to a line.

  python -m tests.golden.make_configs

A change of a preset, or of a default that it rests on, is then seen in review as what it is.
"""

import pathlib

from launch.overrides import load
from models import llama
from models.sizes import SIZES
from train.config import flatten

FILE = pathlib.Path(__file__).parent / "configs.txt"
SPECS = (
  *(
    f"configs/{family}.py:{size}"
    for family in ("griffin", "hawk", "transformer", "llama")
    for size in SIZES
  ),
  *(f"configs/llama.py:{name}" for name in llama.PUBLISHED),
  *(f"configs/recurrentgemma.py:{size}" for size in ("2b", "9b")),
  *(f"configs/long_row.py:{size}" for size in ("1b", "7b")),
  "configs/scaling.py:mini/griffin/w16/1e11",
  "configs/scaling.py:mini/hawk/w64/3e12",
  "configs/scaling.py:small/transformer/w256/1e15",
  "configs/scaling.py:isoflop/griffin/1b/1e20",
  "configs/scaling.py:optimal/transformer/7b",
  "configs/scaling.py:mini/llama/w24/1e12",
  "configs/smoke.py",
  "configs/bench_cpu.py",
)


def lines() -> list[str]:
  """ "file:argument field = value" for every field, sorted within a config."""
  return [
    f"{spec.removeprefix('configs/')} {path} = {value!r}"
    for spec in SPECS
    for path, value in sorted(flatten(load(spec)).items())
  ]


if __name__ == "__main__":
  FILE.write_text("\n".join(lines()) + "\n")
