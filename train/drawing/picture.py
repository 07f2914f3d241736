"""A picture in our look, and how it becomes a file: as SVG with values under the pointer, or PNG.

matplotlib is imported where something is drawn, in train/drawing alone: it takes a second or more
of every start, and most commands draw nothing.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from train.drawing.colors import FAINT, GRID, INK

if TYPE_CHECKING:
  from matplotlib.axes import Axes

TITLE_HEIGHT = 26.0
# Places are measured with the font that comes with matplotlib, so that they are the same
# everywhere; it is wider than those that readers have.
_READERS_FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE: dict[Any, Any] = {
  "font.family": ["DejaVu Sans"],
  "font.size": 12,
  "text.color": INK,
  "axes.labelcolor": FAINT,
  "axes.labelsize": 12,
  "axes.edgecolor": FAINT,
  "axes.linewidth": 1.0,
  "axes.facecolor": "none",
  "axes.axisbelow": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "xtick.color": FAINT,
  "ytick.color": FAINT,
  "grid.color": GRID,
  "grid.linewidth": 1.0,
  "lines.linewidth": 1.8,
  "svg.fonttype": "none",
  "svg.hashsalt": "one and the same",
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_LEAST_TARGET = 12.0  # what a pointer can hit


class Picture:
  """What is drawn on `width` x `height` units, pixels of a page; y counts downward from the top."""

  def __init__(self, width: float, height: float, title: str):
    from matplotlib.figure import Figure

    self.width, self.height, self.title = width, height, title
    # At 72 dots an inch a point is a unit.
    self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    self._targets: list[tuple[float, float, float, float, str]] = []
    self.words(2, 17, title, size=13.5, weight="bold")

  def axes(self, left: float, right: float, top: float, bottom: float) -> "Axes":
    """Axes between these places."""
    width, height = self.width, self.height
    return self.figure.add_axes(
      (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
    )

  def words(
    self,
    x: float,
    y: float,
    words: str,
    *,
    color: str = INK,
    size: float = 12,
    weight: str = "normal",
    align: Literal["left", "center", "right"] = "left",
  ) -> None:
    """Words whose base line is at y."""
    look = {"color": color, "size": size, "weight": weight, "ha": align, "va": "baseline"}
    # Names may hold dollar signs, which would begin a formula.
    place = x / self.width, 1 - y / self.height
    self.figure.text(*place, words, parse_math=False, **look)

  def line(self, start: tuple[float, float], end: tuple[float, float], **look: Any) -> None:
    """A line from (x, y) to (x, y), by default a thin one."""
    from matplotlib.lines import Line2D

    x, y = zip(start, end)
    places = [part / self.width for part in x], [1 - part / self.height for part in y]
    self.figure.add_artist(Line2D(*places, **{"linewidth": 0.8, **look}))

  def square(self, x: float, y: float, size: float, color: str) -> None:
    """A filled square with its upper left corner at (x, y)."""
    from matplotlib.patches import Rectangle

    corner = (x / self.width, 1 - (y + size) / self.height)
    edges = size / self.width, size / self.height
    self.figure.add_artist(Rectangle(corner, *edges, facecolor=color, linewidth=0))

  def tooltip(
    self, axes: "Axes", x: tuple[float, float], y: tuple[float, float] | None, words: str
  ) -> None:
    """Words that a page shows while the pointer is between these values of x and of y; None is all
    of y.

    The limits of the axes must stand.
    """
    low, high = axes.get_ylim() if y is None else y
    (left, bottom), (right, top) = axes.transData.transform([(x[0], low), (x[1], high)])
    self._targets.append((left, self.height - top, right - left, top - bottom, words))

  def png(self, *, dots: float = 1.0) -> bytes:
    """The picture as PNG, with so many dots for a unit."""
    return self._saved("png", dpi=72 * dots, metadata={"Software": None})

  def svg(self) -> str:
    """The picture as one element <svg>, for a page or a file; the same one gives the same text."""
    drawn = self._saved("svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(drawn)
    named = {name[1:] for part in root.iter() if (name := part.get(_LINK))}
    named |= set(re.findall(r"url\(#([^)]*)\)", drawn.decode()))
    inner = [clean for part in root for clean in _cleaned(part, named)]
    root.clear()
    root.tag = "svg"
    root.attrib = {
      "xmlns": _SVG[1:-1],
      "viewBox": f"0 0 {self.width:g} {self.height:g}",
      "width": f"{self.width:g}",
      "height": f"{self.height:g}",
      "role": "img",
      "aria-label": self.title,
      "font-family": _READERS_FONTS,
      "stroke-linejoin": "round",
    }
    root.extend(inner)
    root.extend(_target(*target) for target in self._targets)
    return ElementTree.tostring(root, encoding="unicode")

  def _saved(self, format: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context(_STYLE):
      self.figure.savefig(file, format=format, **options)
    return file.getvalue()


@contextlib.contextmanager
def drawing(width: float, height: float, *, title: str) -> Iterator[Picture]:
  """A new picture; what is drawn on it in this context has our look."""
  from matplotlib import rc_context

  with rc_context(_STYLE):
    yield Picture(width, height, title)


def _cleaned(part: Element, named: set[str]) -> list[Element]:
  """An element as it is worth its bytes: without names that nothing refers to, groups that say
  nothing, digits that nobody sees, and fonts, which the picture has."""
  part.tag = part.tag.removeprefix(_SVG)
  if part.get("id") not in named:
    part.attrib.pop("id", None)
  if (link := part.attrib.pop(_LINK, None)) is not None:
    part.set("href", link)
  for name in part.attrib.keys() & {"d", "x", "y", "width", "height", "transform"}:
    part.set(name, re.sub(r"(\.\d\d)\d+", r"\1", " ".join(part.attrib[name].split())))
  if part.get("transform", "").startswith("rotate(-0 "):
    del part.attrib["transform"]
  if "style" in part.attrib:
    part.set("style", re.sub(r" ?font-family: [^;]*;?", "", part.attrib["style"]))
  if part.tag != "text":
    part.text = None
  part.tail = None
  children = [clean for child in part for clean in _cleaned(child, named)]
  if part.tag == "g" and not part.attrib:
    return children
  if part.tag == "style" or (part.tag == "defs" and not children):
    return []
  part[:] = children
  return [part]


def _target(x: float, y: float, width: float, height: float, words: str) -> Element:
  """A rectangle that is not seen and shows words under the pointer."""
  more_x, more_y = (max(0.0, _LEAST_TARGET - size) / 2 for size in (width, height))
  places = {"x": x - more_x, "y": y - more_y}
  places |= {"width": width + 2 * more_x, "height": height + 2 * more_y}
  numbers = {name: f"{place:.1f}" for name, place in places.items()}
  rect = Element("rect", {**numbers, "class": "tooltip", "fill-opacity": "0"})
  ElementTree.SubElement(rect, "title").text = words
  return rect
