"""What is in a picture, for tests of pictures: words, lines, areas, markers and tooltips."""

import re
from xml.etree import ElementTree


def outside(page: str) -> list[str]:
  """What a page would run or fetch: nothing, but for what it refers to within itself."""
  return re.findall(
    r"""<script|<link|<img|@import|src=|href=["']?(?!["']?#)|url\((?!#)"""
    r"|https?://(?!www\.w3\.org/2000/svg)",
    page,
  )


def words(svg: str) -> dict[str, tuple[float, float]]:
  """word -> its place in a picture, (x, y), y counted downward."""
  found = {}
  for text in _parts(svg, "text"):
    if "rotate" not in text.get("transform", ""):
      found[text.text] = (float(text.get("x")), float(text.get("y")))
    else:
      found[text.text] = tuple(map(float, re.findall(r"[\d.]+", text.get("transform"))[1:3]))
  return found


def color_of(svg: str, word: str) -> str:
  """The color in which a word is written."""
  (style,) = {text.get("style") for text in _parts(svg, "text") if text.text == word}
  return re.search(r"fill: (#\w{6})", style)[1]


def lines(svg: str) -> list[tuple[str, list[tuple[float, float]]]]:
  """Of each line of a picture its color and places, (x, y)."""
  found = []
  for path in _parts(svg, "path"):
    style = path.get("style", "")
    if "fill: none" in style and "stroke: #" in style:
      places = re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.get("d"))
      color = re.search(r"stroke: (#\w{6})", style)[1]
      found.append((color, [(float(x), float(y)) for x, y in places]))
  return found


def areas(svg: str) -> list[tuple[str, float, float, float, float]]:
  """Of each filled path of a picture its color and where it begins and ends: left, top, right and
  bottom."""
  found = []
  for path in _parts(svg, "path"):
    if color := re.match(r"fill: (#\w{6})", path.get("style", "")):
      places = re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d"))
      x, y = ([float(place[index]) for place in places] for index in (0, 1))
      found.append((color[1], min(x), min(y), max(x), max(y)))
  return found


def marks(svg: str) -> list[tuple[str, float, float]]:
  """Of each dot, ring or other marker of a picture its edge's color and its place, (x, y)."""
  found = []
  for use in _parts(svg, "use"):
    color = re.search(r"stroke: (#\w{6})", use.get("style"))[1]
    found.append((color, float(use.get("x")), float(use.get("y"))))
  return found


def tooltips(svg: str) -> list[tuple[float, float, str]]:
  """The tooltips of a picture from left to right: (left, right, words)."""
  found = []
  for rect in _parts(svg, "rect"):
    if rect.get("class") == "tooltip":
      (title,) = rect
      left, width = float(rect.get("x")), float(rect.get("width"))
      found.append((left, left + width, title.text))
  return sorted(found)


def _parts(svg: str, tag: str) -> list[ElementTree.Element]:
  return list(ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))
