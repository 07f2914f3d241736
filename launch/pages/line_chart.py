"""Lines over one axis, each with its name at its end: no legend to look up."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from launch.pages import svg
from train.telemetry.loss_curve import smooth

_TOP, _BOTTOM, _LEFT = 14.0, 38.0, 46.0
_LABEL_HEIGHT = 15.0
_MOST_MARKS, _MOST_DOTS = 6, 40
_MOST_POINTS = 700  # of a line: more than a picture has columns


class Line(NamedTuple):
  """Points with x ascending. `label` is written at the end; an empty one leaves the line unnamed.

  style: "line", "faint" (the noise behind a smoothed line) or "dots" (few and far between).
  """

  points: Sequence[tuple[float, float]]
  color: str
  label: str = ""
  style: Literal["line", "faint", "dots"] = "line"


class Mark(NamedTuple):
  """A dashed vertical line at x with a word at its top; of very many, ticks and their number."""

  x: float
  label: str
  color: str = svg.FAINT


class Axis(NamedTuple):
  """How numbers of an axis are placed and written. `low`, `high` bound what is shown; None: as the
  points need. `at` are the numbers that are written; empty: round ones."""

  label: str = ""
  scale: Literal["linear", "log"] = "linear"
  show: Callable[[float], str] = svg.short
  low: float | None = None
  high: float | None = None
  at: Sequence[float] = ()


def chart(
  lines: Sequence[Line],
  *,
  x: Axis,
  y: Axis,
  width: float,
  height: float,
  marks: Sequence[Mark] = (),
  room: float = 110.0,
) -> str:
  """The picture; `room` is for the names at the right. Points beyond an axis end at its edge."""
  lines = [
    line._replace(points=_thinned(_entering(_finite(line.points, x, y), y.high))) for line in lines
  ]
  lines = [line for line in lines if line.points]
  if not lines:
    return ""
  x_low, x_high = _range([point[0] for line in lines for point in line.points], x, pad=0.0)
  y_low, y_high = _range([point[1] for line in lines for point in line.points], y, pad=0.06)
  right, bottom = width - room, height - _BOTTOM
  place_x = _placer(x.scale, x_low, x_high, _LEFT, right)
  place_y = _placer(y.scale, y_low, y_high, bottom, _TOP)
  shapes = []
  for tick in y.at or ticks(y_low, y_high, y.scale, most=max(3, int(height / 45))):
    at = place_y(tick)
    shapes.append(svg.line([(_LEFT, at), (right, at)], svg.GRID))
    shapes.append(svg.text(_LEFT - 7, at + 4, y.show(tick), anchor="end", color=svg.FAINT, size=12))
  for tick in x.at or ticks(x_low, x_high, x.scale, most=max(3, int(width / 105))):
    at = place_x(tick)
    shapes.append(svg.line([(at, bottom), (at, bottom + 4)], svg.FAINT))
    shapes.append(
      svg.text(at, bottom + 18, x.show(tick), anchor="middle", color=svg.FAINT, size=12)
    )
  shapes.append(svg.line([(_LEFT, bottom), (right, bottom)], svg.FAINT))
  shapes.append(svg.text(right, height - 4, x.label, anchor="end", color=svg.FAINT, size=12))
  shapes += _marks(marks, place_x, bottom, right)
  for line in lines:
    shapes += _drawn(line, [(place_x(a), place_y(b)) for a, b in line.points])
  ends = [
    (place_x(line.points[-1][0]), place_y(line.points[-1][1]), line.label, line.color)
    for line in lines
    if line.label
  ]
  return svg.svg(width, height, [*shapes, *_labels(ends, right, bottom)])


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points with y averaged over those around, but for the ends, where there are few."""
  near_end = -(-(len(points) // 40) // 4)
  means = smooth([y for _, y in points])
  every = [(x, mean) for (x, _), mean in zip(points, means)]
  return every[near_end : len(every) - near_end]


def ticks(low: float, high: float, scale: str, *, most: int) -> list[float]:
  """Round numbers in [low, high], at most about `most` of them."""
  if scale == "log":
    decades = math.log10(high / low)
    if decades >= 1.2:
      step = math.ceil(decades / most)
      exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
      chosen = [10.0**exponent for exponent in exponents if exponent % step == 0]
      if decades <= 2.5:
        factors = (2, 5) if decades <= 1.8 else (3,)
        below = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        chosen += [factor * 10.0**exponent for factor in factors for exponent in below]
      return sorted(tick for tick in chosen if low <= tick <= high)
  step = _round_step((high - low) / most)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [index * step for index in range(first, last + 1)]


def without_first_steps(values: Sequence[float]) -> float | None:
  """A bound for an axis of losses: where the first steps would leave no room for the others, they
  leave the picture at the top."""
  if not values:
    return None
  ordered = sorted(values)
  low, high, most = ordered[0], ordered[-1], ordered[int(0.95 * (len(values) - 1))]
  return most + 0.1 * (most - low) if high - low > 2 * (most - low) > 0 else None


def _round_step(size: float) -> float:
  power = 10.0 ** math.floor(math.log10(size))
  return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """Of very many points the lowest and the highest of each stretch, so that no peak is lost."""
  stretch = len(points) // _MOST_POINTS
  if stretch < 2:
    return points
  kept = {0, len(points) - 1}
  for start in range(0, len(points), 2 * stretch):
    indices = range(start, min(start + 2 * stretch, len(points)))
    kept |= {choose(indices, key=lambda index: points[index][1]) for choose in (min, max)}
  return [points[index] for index in sorted(kept)]


def _finite(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float]]:
  """What can be drawn: finite, and above 0 where the axis has a logarithm."""

  def fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (axis.scale == "linear" or value > 0)

  return [(a, b) for a, b in points if fits(a, x) and fits(b, y)]


def _entering(points: list[tuple[float, float]], high: float | None) -> list[tuple[float, float]]:
  """Without the first points above `high`, but from where the line comes below it."""
  first = next((index for index, (_, b) in enumerate(points) if high is None or b <= high), None)
  if not first or high is None:
    return points
  (x0, y0), (x1, y1) = points[first - 1 : first + 1]
  return [(x0 + (x1 - x0) * (y0 - high) / (y0 - y1), high), *points[first:]]


def _range(values: Sequence[float], axis: Axis, *, pad: float) -> tuple[float, float]:
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


def _placer(scale: str, low: float, high: float, start: float, end: float):
  """A value to its place, held between the ends of the axis."""

  def place(value: float) -> float:
    if scale == "log":
      share = math.log(value / low) / math.log(high / low)
    else:
      share = (value - low) / (high - low)
    return start + (end - start) * min(1.0, max(0.0, share))

  return place


def _drawn(line: Line, places: list[tuple[float, float]]) -> list[str]:
  if line.style == "faint":
    return [svg.line(places, line.color, opacity=0.3)]
  shapes = [svg.line(places, line.color, width=1.8)]
  if len(places) == 1 or (line.style == "dots" and len(places) <= _MOST_DOTS):
    shapes += [svg.circle(*place, 2.6, line.color, filled=True) for place in places]
  return shapes


def _marks(
  marks: Sequence[Mark], place_x: Callable[[float], float], bottom: float, right: float
) -> list[str]:
  shapes, free = [], -math.inf
  if len(marks) > _MOST_MARKS:
    # Short ticks, and one word for all.
    for mark in marks:
      at = place_x(mark.x)
      shapes.append(svg.line([(at, _TOP - 2), (at, _TOP + 5)], mark.color))
    words = f"{len(marks)} {marks[0].label}s"
    return [*shapes, svg.text(_LEFT, _TOP - 4, words, color=svg.FAINT, size=11)]
  for mark in sorted(marks, key=lambda mark: mark.x):
    at = place_x(mark.x)
    shapes.append(svg.line([(at, _TOP - 4), (at, bottom)], mark.color, dashes="2 3"))
    size = 6.2 * len(mark.label)
    # A word where it has room: all marks of one kind look alike.
    if at > free and mark.label:
      is_left = at + size > right
      anchor, x = ("end", at - 4) if is_left else ("start", at + 4)
      shapes.append(svg.text(x, _TOP - 3, mark.label, anchor=anchor, color=mark.color, size=11))
      free = at + size
  return shapes


def _labels(
  ends: Sequence[tuple[float, float, str, str]], right: float, bottom: float
) -> list[str]:
  """The names at the right of their lines' ends, moved apart where they would overlap."""
  shapes, order = [], sorted(ends, key=lambda end: end[1])
  # Downward from the top, then back up from the bottom, so that all stay in the picture.
  tops = [end[1] for end in order]
  for index in range(1, len(tops)):
    tops[index] = max(tops[index], tops[index - 1] + _LABEL_HEIGHT)
  limit = bottom  # below are the numbers of the axis
  for index in reversed(range(len(tops))):
    tops[index] = min(tops[index], limit)
    limit = tops[index] - _LABEL_HEIGHT
  for (x, y, label, color), top in zip(order, tops):
    if abs(top - y) > 3 or x < right - 3:
      # Dotted where it is long, or it would look like more of the line.
      dashes = "1 4" if x < right - 12 else "none"
      leader = [(x + 3, y), (right + 4, top)]
      shapes.append(svg.line(leader, color, width=0.8, opacity=0.7, dashes=dashes))
    shapes.append(svg.text(right + 8, top + 4, label, color=color, size=12, weight=500))
  return shapes
