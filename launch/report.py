"""Shows runs, or a sweep: `python -m launch.report RUN [RUN ...] [--output=report.html]`.

RUN is a workdir of launch.train, also one that still trains or was killed. Writes one page that
needs no network and no other file, and a few lines to the console.

The workdir of one sweep, or a points.json of one, becomes the page of its scaling laws, with
loss.svg, isoflop.svg, optimal.svg and points.json beside it; by default in its own folder.

Exit status: 0, or 2 for a command that cannot be run.
"""

import pathlib
import shlex
import statistics
import sys
from collections.abc import Sequence

from absl import app, flags

from launch import report_page, svg
from train import history
from train.history import History, duration

_OUTPUT = flags.DEFINE_string("output", None, "The page to write; report.html if not given.")


def main(argv: Sequence[str]) -> None:
  if len(argv) < 2:
    _refuse("no run is given; give the workdir of at least one: python -m launch.report runs/smoke")
  if len(argv) == 2 and _is_sweep(pathlib.Path(argv[1])):
    _report_sweep(pathlib.Path(argv[1]))
    return
  try:
    runs = [history.read(folder) for folder in argv[1:]]
  except ValueError as error:
    _refuse(str(error))
  command = shlex.join(["python", "-m", "launch.report", *sys.argv[1:]])
  path = pathlib.Path(_OUTPUT.value or "report.html")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(report_page.page(runs, command=command), encoding="utf-8")
  for run, label in zip(runs, report_page.labels(runs)):
    print("\n".join(summary(run, label)))
  print(f"page: {path}")


def _is_sweep(path: pathlib.Path) -> bool:
  return (path / "sweep.json").is_file() or (path.is_file() and path.suffix == ".json")


def _report_sweep(path: pathlib.Path) -> None:
  # Imported where it is asked for: it loads jax, and the page of a run needs none.
  from train import scaling_report

  output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
  try:
    print("\n".join(scaling_report.report(path, output)))
  except ValueError as error:
    _refuse(str(error))


def summary(run: History, label: str) -> list[str]:
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
      f"  memory horizon of the median channel: {svg.short(middle)} tokens; from "
      f"{svg.short(shortest[1])} in block {shortest[0]} to {svg.short(longest[1])} in block "
      f"{longest[0]}"
    )
  return lines + [f"  missing: {line}" for line in run.missing]


def _refuse(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  app.run(main)
