"""Families for a comparison: on rows of one length, in a good layout."""

import dataclasses

from launch.overrides import ask
from sharding.machine import Machine
from train.config import Run
from train.planning.layouts import Layout
from train.planning.search import SAFE_MARGIN, search

_CONFIG = "configs/comparison.py"


def compared() -> tuple[str, ...]:
  """The families that configs/comparison.py names, others to be compared with the first."""
  return ask(_CONFIG, "get_families")


def with_rows(run: Run, *, num_devices: int, row_length: int, tokens_per_chip: int) -> Run:
  """`run` on rows of that length; ValueError where the tokens are no whole number of rows."""
  rows, rest = divmod(tokens_per_chip * num_devices, row_length)
  if rest or not rows:
    raise ValueError(
      f"families: {tokens_per_chip} tokens for each of {num_devices} chips are no whole "
      f"number of rows of {row_length}; change --tokens_per_chip or --rows"
    )
  data = dataclasses.replace(run.data, row_length=row_length)
  return dataclasses.replace(run, batch_size=rows, data=data)


def best_layout(run: Run, machine: Machine) -> Layout:
  """The best layout by the models; ValueError where none fits."""
  found = search(run, machine)
  if not found or found[0].margin < SAFE_MARGIN:
    raise ValueError(
      f"families: no layout of {run.name} with {run.batch_size} rows of {run.data.row_length} "
      f"fits {machine}; use more chips or fewer --tokens_per_chip"
    )
  return found[0].layout
