"""Shows runs, or a sweep: `python -m launch.report RUN [RUN ...] [--output=report.html]`.

RUN is a workdir of launch.train, also one that still trains or was killed. Writes one page that
needs no network and no other file, and a few lines to the console.

The workdir of one sweep, or a points.json of one, becomes the page of its scaling laws, with
loss.svg, isoflop.svg, optimal.svg and points.json beside it; by default in its own folder.

Exit status: 0, or 2 for a command that cannot be run.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags

from launch import report_page
from launch.console import parse_flags, refuse
from launch.report_text import summary_lines
from train import history

_OUTPUT = flags.DEFINE_string("output", None, "The page to write; report.html if not given.")


def main(argv: Sequence[str]) -> None:
  if len(argv) < 2:
    refuse(
      ValueError(
        "no run is given; give the workdir of at least one: python -m launch.report runs/smoke"
      )
    )
  if len(argv) == 2 and _is_sweep(pathlib.Path(argv[1])):
    _report_sweep(pathlib.Path(argv[1]))
    return
  try:
    runs = [history.read(folder) for folder in argv[1:]]
  except ValueError as error:
    refuse(error)
  command = shlex.join(["python", "-m", "launch.report", *sys.argv[1:]])
  path = pathlib.Path(_OUTPUT.value or "report.html")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(report_page.page(runs, command=command), encoding="utf-8")
  for run, label in zip(runs, report_page.labels(runs)):
    print("\n".join(summary_lines(run, label)))
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
    refuse(error)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
