"""The colors of all pictures: a family has the same one wherever it is drawn.

All stand out from white (3:1 or more) and from each other, also for color-blind people; the test
beside says how far.
"""

import colorsys
import zlib
from collections.abc import Sequence
from typing import NamedTuple

INK, FAINT, GRID = "#222222", "#757575", "#e6e6e6"
BLUE, VERMILLION, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
BROWN, WINE, NAVY, VIOLET = "#8c510a", "#882255", "#2a2f86", "#8a2be2"
# Of areas only: words and lines in them would be lost on white.
SKY, SAND, SILVER, SLATE = "#56b4e9", "#e6ab02", "#c4c4c4", "#4d4d4d"
HELD_OUT = INK  # beside a training curve, whatever color that has
# For many things without an order, in this order.
DISTINCT = (BLUE, VERMILLION, GREEN, PINK, BROWN, WINE, NAVY, VIOLET)


class Look(NamedTuple):
  """A color as "#rrggbb" and the marker that goes with it, as matplotlib names it."""

  color: str
  marker: str


FAMILIES = {
  "griffin": Look(BLUE, "o"),
  "hawk": Look(VERMILLION, "s"),
  "transformer": Look(GREEN, "^"),
  "mamba": Look(PINK, "P"),
  "llama": Look(BROWN, "v"),
  "megalodon": Look(WINE, "D"),
  "mamba-2": Look(NAVY, "X"),
  "gated-deltanet": Look(VIOLET, "p"),
}
_MARKERS = ("h", "<", ">", "*")


def of_family(name: str) -> Look:
  """The look of a family, also of a preset of one ("griffin-1b"). One that is not in the table has
  a look of its own, which follows from its name."""
  family = _family(name)
  if family is not None:
    return FAMILIES[family]
  number = zlib.crc32(_plain(name).encode())
  red, green, blue = colorsys.hls_to_rgb((number % 360) / 360, 0.33, 0.55)
  color = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
  return Look(color, _MARKERS[number % len(_MARKERS)])


def of_runs(names: Sequence[str]) -> list[str]:
  """A color for each run by its name: that of its family where no run before it has it, or else the
  next of DISTINCT that is free."""
  families = [_family(name) for name in names]
  own = {FAMILIES[family].color for family in families if family is not None}
  free = [color for color in DISTINCT if color not in own] or list(DISTINCT)
  found, used = [], 0
  for family in families:
    color = FAMILIES[family].color if family is not None else None
    if color is None or color in found:
      color, used = free[used % len(free)], used + 1
    found.append(color)
  return found


def in_order(index: int, count: int) -> str:
  """The color of the index-th of `count` things in an order, dark to light (viridis, without the
  greens and yellows that are lost on white)."""
  from matplotlib import colormaps  # see train/drawing/picture.py
  from matplotlib.colors import to_hex

  return to_hex(colormaps["viridis"](0.72 * index / (count - 1) if count > 1 else 0.3))


def is_light(color: str) -> bool:
  """Whether words on this color ("#rrggbb") are better read in ink than in white."""
  red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
  return 0.299 * red + 0.587 * green + 0.114 * blue > 150


def _family(name: str) -> str | None:
  """The family with the longest name that `name` begins with, as a whole word."""
  plain = _plain(name)
  known = [family for family in FAMILIES if f"{plain}-".startswith(f"{family}-")]
  return max(known, key=len, default=None)


def _plain(name: str) -> str:
  return name.strip().lower().replace(" ", "-").replace("_", "-")
