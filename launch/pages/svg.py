"""Pieces of SVG pictures: shapes, words, numbers for people, and colors that everybody can tell."""

import html
import math
from collections.abc import Iterable

INK, FAINT, GRID = "#222", "#777", "#e6e6e6"
# For things without an order (M. Okabe and K. Ito), also for color-blind people.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
# For things in an order, dark to light, without the yellow that is lost on white (viridis).
_ORDERED = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (170, 205, 50))


def svg(width: float, height: float, shapes: Iterable[str]) -> str:
  """A picture as wide as its place, with the shapes in units of its `width`."""
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
    f'font-family="system-ui,sans-serif" font-size="13">{"".join(shapes)}</svg>'
  )


def rect(x: float, y: float, width: float, height: float, color: str, title: str = "") -> str:
  """A filled rectangle; `title` is shown under a mouse."""
  inner = f"<title>{html.escape(title)}</title>" if title else ""
  return (
    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
    f'fill="{color}">{inner}</rect>'
  )


def text(
  x: float,
  y: float,
  words: str,
  *,
  anchor: str = "start",
  weight: int = 400,
  color: str = INK,
  size: int = 13,
) -> str:
  """Words whose base line is at y."""
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
    f'font-size="{size}" fill="{color}">{html.escape(words)}</text>'
  )


def line(
  points: Iterable[tuple[float, float]],
  color: str,
  *,
  width: float = 1.0,
  opacity: float = 1.0,
  dashes: str = "none",
) -> str:
  """A line through the points."""
  path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
  return (
    f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
    f'stroke-opacity="{opacity}" stroke-dasharray="{dashes}" stroke-linejoin="round"/>'
  )


def circle(x: float, y: float, radius: float, color: str, *, filled: bool) -> str:
  """A dot, or a ring."""
  fill = color if filled else "#fff"
  return (
    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{color}" '
    'stroke-width="1.4"/>'
  )


def in_order(index: int, count: int) -> str:
  """The color of the index-th of `count` things in an order."""
  position = (len(_ORDERED) - 1) * (index / (count - 1) if count > 1 else 0.3)
  low = min(int(position), len(_ORDERED) - 2)
  mixed = (round(a + (b - a) * (position - low)) for a, b in zip(_ORDERED[low], _ORDERED[low + 1]))
  return "#" + "".join(f"{part:02x}" for part in mixed)


def short(value: float) -> str:
  """A number with a letter for thousands: 950, 1.5k, 20M, 3B, 1.2T; powers of ten beyond."""
  if value == 0 or not math.isfinite(value):
    return "0" if value == 0 else "?"
  size = abs(value)
  if size >= 1e15:
    exponent = math.floor(math.log10(size) + 1e-9)
    factor = f"{value / 10**exponent:.3g}"
    power = "10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == "1" else f"{factor}·{power}"
  for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if size >= 0.9995 * scale:
      return f"{value / scale:.3g}{letter}"
  if size >= 1e-3:
    return f"{value:.3g}"
  factor, _, exponent = f"{value:.1e}".partition("e")
  return f"{factor.removesuffix('.0')}e{int(exponent)}"
