"""The loss curve of a run as a picture."""

import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from train.workdir.jsonl import read_jsonl, series

_TRAIN, _EVAL = "#4c78a8", "#d1495b"


def plot_losses(jsonl_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> bool:
  """Draws training and held-out loss over steps from a metrics file; False if it has no loss yet.

  Of a step that is there several times the last record counts. Values that are not finite are left
  out. The picture appears whole or not at all.
  """
  train = series(read_jsonl(jsonl_path), "train/loss")
  held_out = series(read_jsonl(jsonl_path), "eval/loss")
  if not train and not held_out:
    return False
  # Imported where it is drawn: it takes a second or more of every start.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
  axes = figure.add_subplot()
  if train:
    steps, values = list(train), list(train.values())
    axes.plot(steps, values, color=_TRAIN, alpha=0.3, linewidth=1)
    last = values[-max(1, len(values) // 20) :]
    label = f"training: {sum(last) / len(last):.3f} at the end"
    axes.plot(steps, smooth(values), color=_TRAIN, linewidth=1.8, label=label)
  if held_out:
    steps, values = list(held_out), list(held_out.values())
    label = f"held out: {values[-1]:.3f} at the end"
    axes.plot(steps, values, color=_EVAL, marker="o", markersize=4, linewidth=1.4, label=label)
  _dress(axes, [*train.values(), *held_out.values()])
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

  path = pathlib.Path(png_path)
  whole = path.with_name(path.name + ".tmp")
  figure.savefig(whole, format="png")
  whole.replace(path)
  return True


def smooth(values: Sequence[float]) -> list[float]:
  """Each value with a few around it: means over a centred window of a twentieth of the curve."""
  reach, sums, means = len(values) // 40, [0.0, *itertools.accumulate(values)], []
  for index in range(len(values)):
    # The window shrinks evenly at both ends, so that a slope is not drawn as a step.
    near = min(reach, index, len(values) - 1 - index)
    means.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
  return means


def _dress(axes: Any, values: list[float]) -> None:
  """Axes, grid and legend. Where the first steps would leave no room for the others, they leave the
  picture at the top."""
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  low, high, most = min(values), max(values), sorted(values)[int(0.98 * (len(values) - 1))]
  if high - low > 3 * (most - low) > 0:
    high = most
  room = 0.06 * (high - low) or 0.05 * abs(low) or 0.1
  axes.set_ylim(low - room, high + 2 * room)
  axes.margins(x=0.02)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, loc="upper right")
