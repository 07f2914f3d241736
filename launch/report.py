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

from launch.console import check_output, parse_flags, refuse, writing
from launch.pages import report_page
from launch.pages.report_text import summary_lines
from train.telemetry import history

_OUTPUT = flags.DEFINE_string("output", None, "The page to write; report.html if not given.")


def main(argv: Sequence[str]) -> None:
  try:
    if len(argv) < 2:
      raise ValueError(
        "no run is given; give the workdir of at least one: python -m launch.report runs/smoke"
      )
    path = pathlib.Path(argv[1])
    lines = _sweep(path) if len(argv) == 2 and _is_sweep(path) else _runs(argv[1:])
  except ValueError as error:
    refuse(error)
  print("\n".join(lines))


def _is_sweep(path: pathlib.Path) -> bool:
  return (path / "sweep.json").is_file() or (path.is_file() and path.suffix == ".json")


def _runs(folders: Sequence[str]) -> list[str]:
  """Writes the page of these runs; the lines for the console."""
  runs = [history.read(folder) for folder in folders]
  command = shlex.join(["python", "-m", "launch.report", *sys.argv[1:]])
  path = _output() or pathlib.Path("report.html")
  page = report_page.page(runs, command=command)
  with writing(path):
    path.write_text(page, encoding="utf-8")
  labels = report_page.labels(runs)
  lines = [line for run, label in zip(runs, labels) for line in summary_lines(run, label)]
  return [*lines, f"page: {path}"]


def _sweep(path: pathlib.Path) -> list[str]:
  """Writes the page of a sweep's laws; the lines for the console."""
  # Imported where it is asked for: it loads jax, and the page of a run needs none.
  from train.scaling import report as scaling_report

  output = _output()
  with writing(output or path):
    return scaling_report.report(path, output)


def _output() -> pathlib.Path | None:
  """Where --output says, in a folder that is made if missing; ValueError where nothing can be
  written."""
  if _OUTPUT.value is None:
    return None
  path = pathlib.Path(_OUTPUT.value)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"--output={path}: {path.parent} cannot be made ({error.strerror}): name another place"
    ) from error
  check_output("output")
  return path


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
