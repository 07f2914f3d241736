"""How a picture becomes a file, and the numbers and bars in it."""

import re

import pytest

from tests import drawn
from train.drawing.bar_chart import Bar, Limit, bars, parts
from train.drawing.numbers import scientific, short
from train.drawing.picture import drawing


def _picture(title="Ångström <& $x$"):
  with drawing(300, 200, title=title) as picture:
    axes = picture.axes(50, 250, 30, 150)
    axes.plot([0, 1, 2], [1, 10, 100], color="#123456")
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 100)
    picture.tooltip(axes, (1, 1), (10, 10), "one & only\n10")
  return picture


def test_the_same_picture_is_the_same_file_and_has_nothing_from_elsewhere():
  first, second = _picture(), _picture()
  assert first.svg() == second.svg()
  assert first.png(dots=2) == second.png(dots=2)
  svg = first.svg()
  assert re.match(r'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 200" ', svg)
  assert "Ångström <& $x$" in drawn.words(svg)
  assert not re.search(r"<style|<!|matplotlib|\d\d\d\d-\d\d-\d\d", svg)
  assert not drawn.outside(svg)
  for elsewhere in ('<use href="a.svg#b"/>', "fill:url(a.svg#b)", "<script>", "http://a.b"):
    assert drawn.outside(svg + elsewhere)
  named = re.findall(r' id="([^"]*)"', svg)
  assert len(named) == len(set(named))
  assert set(named) == set(re.findall(r'(?:url\(|href=")#([^")]*)', svg))


def test_a_tooltip_lies_around_its_point():
  ((left, right, words),) = drawn.tooltips(_picture().svg())
  assert words == "one & only\n10"
  assert (left, right) == (144, 156)
  ((_, places),) = [line for line in drawn.lines(_picture().svg()) if line[0] == "#123456"]
  assert places[1] == (150, pytest.approx(150 - 12, abs=0.01))


def test_bars_are_as_long_as_their_sizes_and_have_their_words():
  rows = [Bar("MLPs", 30.0, "30 TFLOP", "#111111"), Bar("logits", 15.0, "15 TFLOP", "#222222")]
  svg = bars(rows, title="FLOPs", unit="TFLOP", width=860).svg()
  (_, left, top, right, _), (_, other_left, other_top, middle, _) = (
    area for area in drawn.areas(svg) if area[0] in ("#111111", "#222222")
  )
  assert left == other_left
  assert top < other_top
  assert middle - left == pytest.approx((right - left) / 2, abs=0.1)
  words = drawn.words(svg)
  assert {"FLOPs", "TFLOP", "MLPs", "logits", "30 TFLOP", "15 TFLOP", "20"} <= words.keys()
  assert {words for *_, words in drawn.tooltips(svg)} == {"MLPs: 30 TFLOP", "logits: 15 TFLOP"}


def test_the_parts_of_a_whole_lie_end_to_end_up_to_and_over_a_limit():
  whole = [
    Bar(name, size, f"{size:g} GB", f"#{size:02.0f}0000") for name, size in (("a", 10), ("b", 20))
  ]
  whole.append(Bar("nothing", 0.0, "0 GB", "#ffffff"))
  limit = Limit(15.0, "15 GB in a chip")
  svg = parts(whole, title="Memory", unit="GB", width=860, limit=limit, note="30 GB needed").svg()
  first, second = drawn.tooltips(svg)
  assert (first[2], second[2]) == ("a: 10 GB", "b: 20 GB")
  assert first[0] == 14
  assert first[1] == pytest.approx(second[0], abs=0.1)
  assert second[1] == pytest.approx(846, abs=0.1)
  words = drawn.words(svg)
  assert {"Memory", "GB", "a 10 GB", "b 20 GB", "30 GB needed"} <= {
    re.sub(" +", " ", word) for word in words
  }
  assert words["15 GB in a chip"][0] == pytest.approx(430, abs=1)
  assert not any("nothing" in word for word in words)


def test_numbers_are_short():
  values = (0, 2.5e-4, 1e-5, 0.001, 0.25, 950, 1500, 2e7, 3.14e12, 1e15, 2.5e18)
  assert [short(value) for value in values] == [
    *("0", "2.5e-4", "1e-5", "0.001", "0.25", "950", "1.5k", "20M", "3.14T", "10¹⁵", "2.5·10¹⁸")
  ]
  assert [scientific(value) for value in (3e11, 1e-3, 1.0)] == ["3·10¹¹", "10⁻³", "10⁰"]
