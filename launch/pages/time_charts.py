"""Pictures of where the time of a run went."""

import math
from collections.abc import Sequence

from launch.pages import svg
from train.telemetry import goodput
from train.telemetry.history import History, duration

# Words and color for each of goodput.KINDS, in the order of the bar.
KINDS = {
  "step": ("training steps, kept", "#009e73"),
  "data_wait": ("waiting for data", "#56b4e9"),
  "evaluation": ("evaluation", "#6a51a3"),
  "checkpoint": ("checkpoints", "#0072b2"),
  "restore": ("restoring", "#8c6d31"),
  "compile": ("compiling", "#cc79a7"),
  "init": ("starting up", "#e6ab02"),
  "lost": ("lost, done again", "#d55e00"),
  "idle": ("not running", "#c4c4c4"),
}


def bar(seconds: dict[str, float], width: float) -> str:
  """One bar, a part for each kind of time; a name and a share below for each."""
  total, x, shapes, shown = sum(seconds.values()), 0.0, [], []
  for kind, (words, color) in KINDS.items():
    share = seconds[kind] / total
    if share <= 0:
      continue
    shown.append((words, color, share, seconds[kind]))
    shapes.append(svg.rect(x, 4, width * share, 34, color, f"{words}: {share:.1%}"))
    if width * share > 44:
      dark = kind in ("idle", "init", "data_wait")
      ink = svg.INK if dark else "#fff"
      middle = x + width * share / 2
      shapes.append(svg.text(middle, 26, f"{share:.0%}", anchor="middle", color=ink, weight=600))
    x += width * share
  for index, (words, color, share, spent) in enumerate(shown):
    left, top = (index % 3) * 290, 52 + index // 3 * 22
    percent = f"{share:.1%}" if share >= 0.001 else "under 0.1%"
    shapes.append(svg.rect(left, top, 12, 12, color))
    shapes.append(svg.text(left + 18, top + 11, f"{words}  {percent}, {duration(spent)}", size=12))
  return svg.svg(width, 56 + -(-len(shown) // 3) * 22, shapes)


def strip(run: History, width: float) -> str:
  """The same in the order in which it happened, with a tick at every start."""
  begin, end = run.log.pieces[0].start, run.log.pieces[-1].end
  scale = width / max(end - begin, 1e-9)
  starts = [(start.time - begin) * scale for start in run.log.starts[1:]]
  words = "in the order it happened" + (", a tick at each restart" if starts else "")
  shapes = [svg.text(0, 12, words, color=svg.FAINT, size=12)]
  for kind, first, last in _columns(run.log.pieces, begin, scale):
    shapes.append(svg.rect(first, 22, last - first, 16, KINDS[kind][1], KINDS[kind][0]))
  shapes += [svg.line([(at, 18), (at, 42)], svg.INK) for at in starts]
  return svg.svg(width, 46, shapes)


def _columns(
  pieces: Sequence[goodput.Piece], begin: float, scale: float
) -> list[tuple[str, int, int]]:
  """(kind, first, last) in units of the picture: each has the color of what it was longest."""
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
