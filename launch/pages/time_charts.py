"""Pictures of where the time of a run went."""

import math
from collections.abc import Sequence

from train.drawing import bar_chart, colors
from train.drawing.bar_chart import Bar
from train.drawing.line_chart import Axis, dress
from train.drawing.picture import TITLE_HEIGHT, Picture, drawing
from train.telemetry import goodput
from train.telemetry.history import History, duration

# Words and color for each of goodput.KINDS, in the order of the bar.
KINDS = {
  "step": ("training steps, kept", colors.GREEN),
  "data_wait": ("waiting for data", colors.SKY),
  "evaluation": ("evaluation", colors.WINE),
  "checkpoint": ("checkpoints", colors.BLUE),
  "restore": ("restoring", colors.BROWN),
  "compile": ("compiling", colors.PINK),
  "init": ("starting up", colors.SAND),
  "lost": ("lost, done again", colors.VERMILLION),
  "idle": ("not running", colors.SILVER),
}
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def bar(seconds: dict[str, float], title: str, width: float) -> Picture:
  """One bar with a part for each kind of time; below it, the name and the share of each."""
  total, rows = sum(seconds.values()), []
  for kind, (words, color) in KINDS.items():
    share = seconds[kind] / total
    percent = f"{share:.1%}" if share >= 0.001 else "under 0.1%"
    exact = f"{percent}, {duration(seconds[kind])}"
    rows.append(Bar(words, 100 * share, exact, color, f"{share:.0%}"))
  return bar_chart.parts(rows, title=title, unit="share of all time (%)", width=width)


def strip(run: History, width: float) -> Picture:
  """The kinds of time in the order in which they happened, with a tick at every start."""
  begin, end = run.log.pieces[0].start, run.log.pieces[-1].end
  scale, unit = clock(end - begin)
  starts = [(start.time - begin) / scale for start in run.log.starts[1:]]
  title = "In the order it happened" + (", a tick at each restart" if starts else "")
  left, right, top = 14.0, width - 14, TITLE_HEIGHT + 6
  columns = (right - left) / max(end - begin, 1e-9)
  with drawing(width, top + 60, title=title) as picture:
    axes = picture.axes(left, right, top, top + 18)
    label = f"{unit} since the first start"
    dress(axes, "x", Axis(label, low=0.0), [(end - begin) / scale], pad=0.0, most=10)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    for kind, first, last in _columns(run.log.pieces, begin, columns):
      x, size = (place / columns / scale for place in (first, last - first))
      axes.barh(0.5, size, 1.0, left=x, color=KINDS[kind][1])
      words = f"{KINDS[kind][0]}: {duration((last - first) / columns)}"
      picture.tooltip(axes, (x, x + size), (0, 1), f"{words}\nfrom {x:.4g} {unit} on")
    for at in starts:
      axes.axvline(at, ymin=-0.25, ymax=1.25, color=colors.INK, linewidth=1.0, clip_on=False)
  return picture


def clock(seconds: float) -> tuple[float, str]:
  """The unit for an axis of so many seconds: its length in seconds, and its name."""
  return next(unit for unit in _UNITS if seconds >= 2 * unit[0] or unit[0] == 1.0)


def _columns(
  pieces: Sequence[goodput.Piece], begin: float, scale: float
) -> list[tuple[str, int, int]]:
  """(kind, first, last) in units of the picture; `kind` is the one that took most of the time."""
  longest: dict[int, dict[str, float]] = {}
  for piece in pieces:
    start, end = (piece.start - begin) * scale, (piece.end - begin) * scale
    for column in range(int(start), math.ceil(end)):
      inside = min(end, column + 1) - max(start, column)
      kinds = longest.setdefault(column, {})
      kinds[piece.kind] = kinds.get(piece.kind, 0.0) + inside
  columns: list[tuple[str, int, int]] = []
  for column, kinds in sorted(longest.items()):
    kind = max(kinds, key=lambda kind: kinds[kind])
    if columns and columns[-1][0] == kind:
      columns[-1] = (kind, columns[-1][1], column + 1)
    else:
      columns.append((kind, column, column + 1))
  return columns
