"""A sweep over tests/tiny.py as its config file: FOLDER/grid.json says which runs.

The grid is a list of [family, steps, peak learning rate]; a run is called FAMILY/STEPS.
"""

import dataclasses
import json
import pathlib

from models import llama
from models.sizes import Size
from tests import tiny
from train.config import Run
from train.scaling.sweep import Point

_SIZE = Size(width=32, rnn_width=32, num_blocks=1, num_heads=2, head_size=16, tokens=0.0)


def get_sweep(folder: str) -> tuple[Point, ...]:
  """The runs of FOLDER/grid.json."""
  grid = json.loads((pathlib.Path(folder) / "grid.json").read_text())
  return tuple(
    Point(
      name=f"{family}/{steps}",
      family=family,
      budget=1e6,
      run=_run(pathlib.Path(folder), family, steps, peak_lr),
    )
    for family, steps, peak_lr in grid
  )


def get_config(name: str) -> Run:
  """FOLDER/FAMILY/STEPS."""
  folder, family, steps = name.rsplit("/", 2)
  return next(point.run for point in get_sweep(folder) if point.name == f"{family}/{steps}")


def _run(folder: pathlib.Path, family: str, steps: int, peak_lr: float) -> Run:
  run = tiny.run(folder, total_steps=steps, eval_every=steps)
  model = llama.of_size(_SIZE, vocab_size=256, dtype="float32", remat="none")
  return dataclasses.replace(
    run,
    model=model if family == "llama" else dataclasses.replace(run.model, num_blocks=1),
    optimizer=dataclasses.replace(run.optimizer, peak_lr=peak_lr),
  )
