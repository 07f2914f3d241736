"""Lines over one axis, each with its name at its end: no legend to look up."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from train.drawing import colors
from train.drawing.numbers import short
from train.drawing.picture import TITLE_HEIGHT, Picture, drawing

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_LEFT, _BOTTOM = 64.0, 42.0
_MARKS_HEIGHT = 14.0  # their words stand above the axes
_LETTER = 7.0  # at the size of labels, on average
_LABEL_HEIGHT = 15.0
_MOST_MARKS, _MOST_DOTS = 6, 40
_TARGET_WIDTH = 7.0


class Line(NamedTuple):
  """Points with x ascending. `label` is written at the end; an empty one leaves the line unnamed.
  `name` is what its values are called under the pointer; with an empty one none are shown.

  style: "line", "faint" (the noise behind a smoothed line) or "dots" (few and far between).
  """

  points: Sequence[tuple[float, float]]
  color: str
  label: str = ""
  name: str = ""
  style: Literal["line", "faint", "dots"] = "line"


class Mark(NamedTuple):
  """A dashed vertical line at x with a word at its top; of very many, ticks and their number."""

  x: float
  label: str
  color: str = colors.FAINT


class Axis(NamedTuple):
  """What an axis counts, with its unit, and how its numbers are placed and written: `show` on the
  axis, `exact` under the pointer. `low`, `high` bound what is shown; None: as the points need. `at`
  are the numbers that are written; empty: round ones."""

  label: str
  scale: Literal["linear", "log"] = "linear"
  show: Callable[[float], str] = short
  exact: Callable[[float], str] = "{:,.4g}".format
  low: float | None = None
  high: float | None = None
  at: Sequence[float] = ()


def chart(
  lines: Sequence[Line],
  *,
  title: str,
  x: Axis,
  y: Axis,
  width: float,
  height: float,
  marks: Sequence[Mark] = (),
) -> Picture | None:
  """The picture; None where no line has a point that can be drawn."""
  lines = [line._replace(points=_finite(line.points, x, y)) for line in lines]
  lines = [line for line in lines if line.points]
  if not lines:
    return None
  room = _room([line.label for line in lines], width)
  with drawing(width, height, title=title) as picture:
    top = TITLE_HEIGHT + (_MARKS_HEIGHT if marks else 4.0)
    axes = picture.axes(_LEFT, width - room, top, height - _BOTTOM)
    columns = int(width - room - _LEFT)
    values_x, values_y = zip(*itertools.chain.from_iterable(line.points for line in lines))
    dress(axes, "x", x, values_x, pad=0.0, most=max(2, columns // 62))
    dress(axes, "y", y, values_y, pad=0.06, most=max(3, int(height / 45)))
    axes.grid(True, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for line in lines:
      _draw(axes, line, most=columns)
    _mark(picture, axes, marks)
    label_ends(picture, axes, [(line.points[-1], line.label, line.color) for line in lines])
    _tooltips(picture, axes, [line for line in lines if line.name], x, y)
  return picture


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points with y averaged over those around, but for the ends, where there are few."""
  near_end = -(-(len(points) // 40) // 4)
  means = smooth([y for _, y in points])
  every = [(x, mean) for (x, _), mean in zip(points, means)]
  return every[near_end : len(every) - near_end]


def smooth(values: Sequence[float]) -> list[float]:
  """Each value with a few around it: means over a centred window of a twentieth of the curve."""
  reach, sums, means = len(values) // 40, [0.0, *itertools.accumulate(values)], []
  for index in range(len(values)):
    # The window shrinks evenly at both ends, so that a slope is not drawn as a step.
    near = min(reach, index, len(values) - 1 - index)
    means.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
  return means


def without_first_steps(values: Sequence[float]) -> float | None:
  """A bound for an axis of losses: where the first steps would leave no room for the others, they
  leave the picture at the top."""
  if not values:
    return None
  ordered = sorted(values)
  low, high, most = ordered[0], ordered[-1], ordered[int(0.95 * (len(values) - 1))]
  return most + 0.1 * (most - low) if high - low > 2 * (most - low) > 0 else None


def dress(
  axes: "Axes",
  which: Literal["x", "y"],
  axis: Axis,
  values: Sequence[float],
  *,
  pad: float = 0.06,
  most: int = 6,
) -> None:
  """Scale, limits, label and at most about `most` numbers of one axis, for these values; `pad` is
  the share of the axis that is left free at its ends."""
  low, high = _limits(values, axis, pad)
  at = axis.at or ticks(low, high, axis.scale, most=most)
  getattr(axes, f"set_{which}scale")(axis.scale)
  getattr(axes, f"set_{which}ticks")(at, labels=[axis.show(tick) for tick in at])
  getattr(axes, f"set_{which}ticks")([], minor=True)
  getattr(axes, f"set_{which}lim")(low, high)
  getattr(axes, f"set_{which}label")(axis.label, parse_math=False)


def ticks(low: float, high: float, scale: str, *, most: int) -> list[float]:
  """Round numbers in [low, high], at most about `most` of them."""
  from matplotlib.ticker import LogLocator, MaxNLocator

  decades = math.log10(high / low) if scale == "log" else 0.0
  if decades < 1.2:
    locator = MaxNLocator(most, steps=[1, 2, 5, 10])
  elif decades > 2.5:
    locator = LogLocator(numticks=most)
  else:
    locator = LogLocator(subs=(1, 2, 5) if decades <= 1.8 else (1, 3), numticks=99)
  inside = [float(at) for at in locator.tick_values(low, high)]
  room = 1e-9 * (high - low)
  return [at for at in inside if low - room <= at <= high + room]


def label_ends(
  picture: Picture,
  axes: "Axes",
  ends: Sequence[tuple[tuple[float, float], str, str]],
) -> None:
  """Writes each of ((x, y), words, color) right of the axes at the height of its point, moved apart
  where they would overlap. The limits of the axes must stand."""
  box = axes.get_position()
  right, bottom = picture.width * box.x1, picture.height * (1 - box.y0)
  top, places = picture.height * (1 - box.y1), []
  for point, words, color in ends:
    if words:
      x, y = axes.transData.transform(point)
      places.append((min(max(picture.height - y, top), bottom), min(x, right), words, color))
  places.sort()
  # Downward from the top, then back up from the bottom, so that all stay in the picture.
  tops = [place[0] for place in places]
  for index in range(1, len(tops)):
    tops[index] = max(tops[index], tops[index - 1] + _LABEL_HEIGHT)
  limit = bottom  # below are the numbers of the axis
  for index in reversed(range(len(tops))):
    tops[index] = min(tops[index], limit)
    limit = tops[index] - _LABEL_HEIGHT
  for (y, x, words, color), at in zip(places, tops):
    if abs(at - y) > 3 or x < right - 3:
      # Dotted where it is long, or it would look like more of the line.
      dots = (0, (1, 4)) if x < right - 12 else "solid"
      picture.line((x + 3, y), (right + 4, at), color=color, alpha=0.7, linestyle=dots)
    words = fitted(words, picture.width - right - 8)
    picture.words(right + 8, at + 4, words, color=color)


def fitted(words: str, room: float) -> str:
  """The words, without some of their middle where they are longer than the room."""
  most = max(3, int(room / _LETTER))
  if len(words) <= most:
    return words
  # The end of a label is its value.
  after = min(most - 2, most * 2 // 3)
  return words[: most - 1 - after] + "…" + words[len(words) - after :]


def _room(labels: Sequence[str], width: float) -> float:
  return min(0.4 * width, 16 + _LETTER * max(map(len, labels)))


def _draw(axes: "Axes", line: Line, *, most: int) -> None:
  x, y = zip(*_thinned(line.points, most))
  if line.style == "faint":
    axes.plot(x, y, color=line.color, alpha=0.3, linewidth=1.0)
    return
  axes.plot(x, y, color=line.color, solid_capstyle="round")
  if len(x) == 1 or (line.style == "dots" and len(x) <= _MOST_DOTS):
    low, high = axes.get_ylim()
    inside = [(a, b) for a, b in zip(x, y) if low <= b <= high]
    for place in inside:
      # Not clipped: a dot at the end of the axis is whole.
      axes.plot(*place, "o", color=line.color, markersize=5, clip_on=False)


def _thinned(points: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
  """Of very many points the lowest and the highest of each of about `most` stretches, so that no
  peak is lost."""
  stretch = len(points) // most
  if stretch < 2:
    return points
  kept = {0, len(points) - 1}
  for start in range(0, len(points), stretch):
    indices = range(start, min(start + stretch, len(points)))
    kept |= {choose(indices, key=lambda index: points[index][1]) for choose in (min, max)}
  return [points[index] for index in sorted(kept)]


def _finite(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float]]:
  """What can be drawn: finite, and above 0 where the axis has a logarithm."""

  def fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (axis.scale == "linear" or value > 0)

  return [(a, b) for a, b in points if fits(a, x) and fits(b, y)]


def _limits(values: Sequence[float], axis: Axis, pad: float) -> tuple[float, float]:
  low = min(values) if axis.low is None else axis.low
  high = max(values) if axis.high is None else axis.high
  if axis.scale == "log":
    if high <= low * 1.01:
      return low / 1.5, high * 1.5
    factor = (high / low) ** pad
    return low / factor, high * factor
  if high <= low:
    near = 0.05 * abs(low) or 1.0
    return low - near * (axis.low is None), low + near
  padding = pad * (high - low)
  return (low if axis.low is not None else low - padding), high + padding


def _mark(picture: Picture, axes: "Axes", marks: Sequence[Mark]) -> None:
  low, high = axes.get_xlim()
  marks = sorted((mark for mark in marks if low <= mark.x <= high), key=lambda mark: mark.x)
  box = axes.get_position()
  right, free = picture.width * box.x1, -math.inf
  above = picture.height * (1 - box.y1) - 3
  if len(marks) > _MOST_MARKS:
    # Short ticks, and one word for all.
    for mark in marks:
      axes.axvline(mark.x, ymin=0.97, color=mark.color, linewidth=1.0)
    picture.words(_LEFT, above, f"{len(marks)} {marks[0].label}s", color=colors.FAINT, size=11)
    return
  for mark in marks:
    axes.axvline(mark.x, color=mark.color, linewidth=1.0, linestyle=(0, (2, 3)))
    at = axes.transData.transform((mark.x, 1.0))[0]
    size = 0.9 * _LETTER * len(mark.label)
    # A word where it has room: all marks of one kind look alike.
    if at > free and mark.label:
      is_left = at + size > right
      align, x = ("right", at - 4) if is_left else ("left", at + 4)
      picture.words(x, above, mark.label, align=align, color=mark.color, size=11)
      free = at + size


def _tooltips(picture: Picture, axes: "Axes", lines: Sequence[Line], x: Axis, y: Axis) -> None:
  """Puts the values of all lines under the pointer, in strips side by side: one around each point
  where there is room, otherwise around evenly chosen ones."""
  low, high = axes.get_xlim()
  box = axes.get_position()
  most = max(1, int(picture.width * box.width / _TARGET_WIDTH))
  at = sorted({a for line in lines for a, _ in line.points if low <= a <= high})
  if len(at) > most:
    at = [at[index * (len(at) - 1) // (most - 1)] for index in range(most)]
  if not at:
    return
  edges = [low, *((before + after) / 2 for before, after in itertools.pairwise(at)), high]
  for left, middle, right in zip(edges, at, edges[1:]):
    found = [(line.name, _nearest(line.points, middle, left, right)) for line in lines]
    values = [f"{name}: {y.exact(value)}" for name, value in found if value is not None]
    words = "\n".join([f"{x.label}: {x.show(middle)}", *values])
    picture.tooltip(axes, (left, right), None, words)


def _nearest(
  points: Sequence[tuple[float, float]], x: float, left: float, right: float
) -> float | None:
  """The y of the point nearest to x in [left, right]."""
  after = bisect.bisect_left(points, (x, -math.inf))
  near = [point for point in points[max(0, after - 1) : after + 1] if left <= point[0] <= right]
  return min(near, key=lambda point: abs(point[0] - x))[1] if near else None
