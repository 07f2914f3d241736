"""A run in a few lines for the console."""

import statistics

from train.drawing.numbers import short
from train.telemetry.history import History, duration


def summary_lines(run: History, label: str) -> list[str]:
  """A few lines for the console."""
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
  horizons = [
    (block, column[max(column)][2]) for block, column in enumerate(run.layer("horizon")) if column
  ]
  if horizons:
    middle = statistics.median(value for _, value in horizons)
    shortest, longest = (choose(horizons, key=lambda pair: pair[1]) for choose in (min, max))
    lines.append(
      f"  memory horizon of the median channel: {short(middle)} tokens; from "
      f"{short(shortest[1])} in block {shortest[0]} to {short(longest[1])} in block "
      f"{longest[0]}"
    )
  return lines + [f"  missing: {line}" for line in run.missing]
