"""The loss curve of a run as a picture."""

import os
import pathlib

from train.drawing import colors
from train.drawing.line_chart import Axis, Line, chart, smoothed, without_first_steps
from train.workdir.jsonl import read_jsonl, series
from train.workdir.whole_file import write_whole


def plot_losses(
  jsonl_path: str | os.PathLike[str], png_path: str | os.PathLike[str], *, name: str
) -> bool:
  """Draws training and held-out loss over steps from the metrics file of the run of this name;
  False if it has no loss yet.

  Of a step that is there several times the last record counts. Values that are not finite are left
  out. The picture appears whole or not at all.
  """
  records = read_jsonl(jsonl_path)
  train, held_out = (series(records, name) for name in ("train/loss", "eval/loss"))
  points, held_out_points = (
    [(float(step), loss) for step, loss in losses.items()] for losses in (train, held_out)
  )
  mean = smoothed(points)
  (color,) = colors.of_runs([name])
  lines = [Line(points, color, style="faint")]
  if mean:
    lines.append(Line(mean, color, f"training {mean[-1][1]:.3f}"))
  if held_out_points:
    label = f"held out {held_out_points[-1][1]:.3f}"
    lines.append(Line(held_out_points, colors.HELD_OUT, label, style="dots"))
  high = without_first_steps([*train.values(), *held_out.values()])
  drawn = chart(
    lines,
    title=f"{name}: loss over training steps",
    x=Axis("steps", low=0.0),
    y=Axis("loss (nats per token)", show="{:.3g}".format, high=high),
    width=800,
    height=450,
  )
  if drawn is None:
    return False
  write_whole(pathlib.Path(png_path), drawn.png(dots=1.5))
  return True
