"""Sizes side by side, and the parts of a whole."""

from collections.abc import Sequence
from typing import NamedTuple

from train.drawing import colors
from train.drawing.line_chart import Axis, dress
from train.drawing.picture import TITLE_HEIGHT, Picture, drawing

_ROW, _BAR, _LABELS, _WORDS, _AXIS = 28.0, 18.0, 225.0, 345.0, 44.0
_KEY_COLUMNS, _KEY_HEIGHT = 3, 22.0
_SIDE = 14.0  # room for half a number at the ends of an axis


class Bar(NamedTuple):
  """`words` say the size exactly: they are written behind the bar, or in the key of a part, which
  has `inside` in it where there is room."""

  label: str
  size: float
  words: str
  color: str
  inside: str = ""


class Limit(NamedTuple):
  """A line across a bar, with words above it."""

  size: float
  words: str


def bars(rows: Sequence[Bar], *, title: str, unit: str, width: float) -> Picture:
  """A bar for each row, downward, over an axis with the unit."""
  height = TITLE_HEIGHT + _ROW * len(rows) + _AXIS
  with drawing(width, height, title=title) as picture:
    right, bottom = width - _WORDS, height - _AXIS
    axes = picture.axes(_LABELS, right, TITLE_HEIGHT, bottom)
    places = [index + 0.5 for index in range(len(rows))]
    sizes = [row.size for row in rows]
    most = max(sizes) or 1.0
    axes.barh(places, sizes, _BAR / _ROW, color=[row.color for row in rows])
    axes.set_ylim(len(rows), 0)
    dress(axes, "x", Axis(unit, low=0.0), sizes, pad=0.0)
    axes.set_yticks(places, labels=[row.label for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=colors.INK)
    for row, place in zip(rows, places):
      at = _LABELS + (right - _LABELS) * row.size / most + 8
      picture.words(at, TITLE_HEIGHT + _ROW * place + 4, row.words)
      picture.tooltip(axes, (0, most), (place + 0.5, place - 0.5), f"{row.label}: {row.words}")
  return picture


def parts(
  whole: Sequence[Bar],
  *,
  title: str,
  unit: str,
  width: float,
  limit: Limit | None = None,
  note: str = "",
) -> Picture:
  """One bar of parts over an axis with the unit, and a key of their words below; `note` stands
  above the bar, beside the words of the limit."""
  whole = [part for part in whole if part.size > 0]
  top = TITLE_HEIGHT + (20.0 if limit else 0.0)
  bottom = top + 40
  height = bottom + _AXIS + 12 + _KEY_HEIGHT * -(-len(whole) // _KEY_COLUMNS)
  with drawing(width, height, title=title) as picture:
    axes = picture.axes(_SIDE, width - _SIDE, top, bottom)
    total = sum(part.size for part in whole)
    most = max(total, limit.size if limit else 0.0) or 1.0
    axes.set_ylim(0, 1)
    dress(axes, "x", Axis(unit, low=0.0, high=most), [0.0], pad=0.0, most=10)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if limit is not None:
      axes.barh(0.5, limit.size, 1.0, color="#f0f0f0")
      axes.axvline(limit.size, ymax=1.2, color=colors.INK, linewidth=2, clip_on=False)
      _say_limit(picture, top - 10, limit, most, note)
    left = 0.0
    for part in whole:
      axes.barh(0.5, part.size, 0.96, left=left, color=part.color)
      picture.tooltip(axes, (left, left + part.size), (0, 1), f"{part.label}: {part.words}")
      if (width - 2 * _SIDE) * part.size / most > 44:
        ink = colors.INK if colors.is_light(part.color) else "#ffffff"
        middle = left + part.size / 2
        axes.text(middle, 0.5, part.inside, color=ink, ha="center", va="center", weight="bold")
      left += part.size
    _key(picture, whole, bottom + _AXIS + 10)
  return picture


def _say_limit(picture: Picture, y: float, limit: Limit, most: float, note: str) -> None:
  """The words of the limit at its line, the note where they are not."""
  at = _SIDE + (picture.width - 2 * _SIDE) * limit.size / most
  if at < picture.width / 2:
    picture.words(at, y, limit.words)
    picture.words(picture.width - _SIDE, y, note, align="right", weight="bold")
  else:
    picture.words(at, y, limit.words, align="right")
    picture.words(_SIDE, y, note, weight="bold")


def _key(picture: Picture, whole: Sequence[Bar], top: float) -> None:
  column_width = (picture.width - 2 * _SIDE) / _KEY_COLUMNS
  for index, part in enumerate(whole):
    x = _SIDE + index % _KEY_COLUMNS * column_width
    y = top + index // _KEY_COLUMNS * _KEY_HEIGHT
    picture.square(x, y, 12, part.color)
    picture.words(x + 18, y + 10.5, f"{part.label}  {part.words}")
