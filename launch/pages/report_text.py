"""A run in a few lines for the console."""

import statistics

from launch.pages.layer_charts import medians
from models.statistics import Picture
from train.drawing.numbers import short
from train.telemetry.history import History, duration


def summary_lines(run: History, label: str) -> list[str]:
  """The lines for one run."""
  of = f" of {run.total_steps:,}" if run.total_steps else ""
  count = len(run.restarts)
  restarts = f", {count} restart{'s' * (count > 1)}" if count else ""
  lines = [f"{label} ({run.workdir}): {run.state}, step {run.step:,}{of}{restarts}"]
  told = [
    ("loss", run.last("train/loss"), "{:.4f}"),
    ("held out", run.last("eval/loss"), "{:.4f}"),
    ("bits/byte", run.last("eval/bits_per_byte"), "{:.4f}"),
    ("tokens/s in the median", run.median("train/tokens_per_second"), "{:,.0f}"),
    ("MFU", run.median("train/mfu"), "{:.1%}"),
    ("gradient norm", run.last("train/grad_norm"), "{:.3g}"),
  ]
  values = [f"{name} {form.format(value)}" for name, value, form in told if value is not None]
  if values:
    lines.append("  " + ", ".join(values))
  seconds = run.log.seconds()
  total = sum(seconds.values())
  if total:
    parts = sorted(
      ((spent, kind) for kind, spent in seconds.items() if spent / total >= 0.001), reverse=True
    )
    shares = ", ".join(f"{kind.replace('_', ' ')} {spent / total:.1%}" for spent, kind in parts)
    lines.append(f"  goodput {seconds['step'] / total:.1%} of {duration(total)}: {shares}")
  pictures = (picture for one in run.statistics for picture in one.pictures)
  for picture in pictures:
    if picture.in_summary and any(run.layer(picture.columns[0])):
      lines.append(_over_blocks(run, picture))
  return lines + [f"  missing: {line}" for line in run.missing]


def _over_blocks(run: History, picture: Picture) -> str:
  """The last values of a column: the median block, the smallest and the largest."""
  columns = enumerate(medians(run, picture.columns[0]))
  values = [(block, column[max(column)]) for block, column in columns if column]
  middle = statistics.median(value for _, value in values)
  least, most = (choose(values, key=lambda pair: pair[1]) for choose in (min, max))
  return (
    f"  {picture.title[0].lower()}{picture.title[1:]}: {short(middle)} {picture.unit}; from "
    f"{short(least[1])} in block {least[0]} to {short(most[1])} in block {most[0]}"
  )
