"""Lines: each value at its place, labels at the ends of lines, values in tooltips."""

import itertools

import pytest

from tests import drawn
from train.drawing.line_chart import (
  Axis,
  Line,
  Mark,
  _thinned,
  chart,
  fitted,
  smooth,
  ticks,
  without_first_steps,
)

X, Y = Axis("tokens"), Axis("loss (nats per token)")


def _svg(lines, *, x=X, y=Y, width=400, height=240, marks=()):
  picture = chart(lines, title="A title", x=x, y=y, width=width, height=height, marks=marks)
  return picture.svg()


def test_a_picture_has_a_title_and_the_units_of_both_axes():
  words = drawn.words(_svg([Line([(0, 1), (2000, 3)], "#000000", "last 3")]))
  assert {"A title", "tokens", "loss (nats per token)", "last 3", "2k"} <= words.keys()
  assert words["A title"][1] < words["last 3"][1] < words["tokens"][1]
  assert words["loss (nats per token)"][0] < words["last 3"][0]


@pytest.mark.parametrize(
  ("scale", "values"), [("linear", (0.0, 5.0, 10.0)), ("log", (1.0, 10.0, 100.0))]
)
def test_a_point_stands_where_its_value_is(scale, values):
  y = Axis("y", scale=scale, low=values[0], high=values[-1])
  svg = _svg([Line(list(enumerate(values)), "#123456", "a")], y=y)
  (places,) = [places for color, places in drawn.lines(svg) if color == "#123456"]
  (left, bottom), (_, middle), (right, top) = places
  assert left < right
  assert top < bottom  # a picture counts downward
  assert middle == pytest.approx((top + bottom) / 2, abs=0.2)


def test_a_tooltip_has_the_values_of_all_lines_at_its_place():
  lines = [
    Line([(0, 1.0), (10, 2.0), (20, 3.0)], "#000000", name="training"),
    Line([(10, 5.0)], "#ff0000", name="held out", style="dots"),
    Line([(0, 9.0)], "#ff0000"),
  ]
  tooltips = drawn.tooltips(_svg(lines))
  assert [words for *_, words in tooltips] == [
    "tokens: 0\ntraining: 1",
    "tokens: 10\ntraining: 2\nheld out: 5",
    "tokens: 20\ntraining: 3",
  ]
  # Side by side, but for the least width of the outer ones.
  assert tooltips[0][1] == pytest.approx(tooltips[1][0], abs=0.2)
  assert tooltips[1][1] == pytest.approx(tooltips[2][0], abs=0.2)


def test_a_long_run_makes_a_small_picture_and_no_peak_is_lost():
  points = [(float(x), 1.0) for x in range(100_000)]
  points[12_345] = (12_345.0, 9.0)
  points[43_210] = (43_210.0, -9.0)
  kept = _thinned(points, 300)
  assert len(kept) < 1000
  assert {points[12_345], points[43_210], points[0], points[-1]} <= set(kept)
  assert list(kept) == sorted(kept)
  svg = _svg([Line(points, "#123456", "a", "a")])
  assert len(svg) < 30_000
  assert 20 < len(drawn.tooltips(svg)) < 100


@pytest.mark.parametrize(
  ("low", "high", "scale", "expected"),
  [
    (0, 10, "linear", [0, 2, 4, 6, 8, 10]),
    (1.8, 2.9, "linear", [2.0, 2.5]),
    (1, 1e6, "log", [1, 100, 10000, 1000000]),
    (0.6, 30, "log", [1, 2, 5, 10, 20]),
    (0.5, 60, "log", [1, 3, 10, 30]),
    (1.4, 2.3, "log", [1.4, 1.6, 1.8, 2.0, 2.2]),
  ],
)
def test_ticks_are_round_and_few(low, high, scale, expected):
  most = 3 if low == 1.8 else 5
  assert ticks(low, high, scale, most=most) == pytest.approx(expected)


def test_labels_stay_in_the_picture_and_apart():
  lines = [Line([(0, 0), (1, 1 + 1e-3 * index)], "#000000", f"line {index}") for index in range(8)]
  words = drawn.words(_svg(lines, marks=[Mark(0.5, "here")]))
  tops = sorted(place[1] for word, place in words.items() if word.startswith("line "))
  assert len(tops) == 8
  assert all(after - before > 14 for before, after in itertools.pairwise(tops))
  assert words["A title"][1] < words["here"][1] < tops[0] < tops[-1] < 240
  nothing = [Line([(0, float("nan"))], "#000000", "a")]
  for lines in ([], nothing):
    assert chart(lines, title="", x=X, y=Y, width=400, height=240) is None


def test_labels_of_lines_that_end_on_the_axis_are_clear_of_its_numbers():
  lines = [Line([(0, 0), (7, 0)], "#000000", f"line {index}") for index in range(4)]
  words = drawn.words(_svg(lines, y=Axis("y", low=0.0)))
  lowest = max(place[1] for word, place in words.items() if word.startswith("line "))
  assert words["2"][1] == words["4"][1]
  assert words["4"][1] - lowest > 12


def test_a_long_label_keeps_its_beginning_and_its_value():
  assert fitted("short 2.1", 100) == "short 2.1"
  label = fitted("a folder with a very long name 2.017", 100)
  assert label.startswith("a f")
  assert label.endswith("name 2.017"[-8:])
  assert len(label) == 14


def test_of_many_restarts_one_word_gives_their_number():
  lines = [Line([(0, 0), (100, 1)], "#000000", "a")]
  words = drawn.words(_svg(lines, marks=[Mark(x, "restart") for x in range(1, 31)]))
  assert "30 restarts" in words
  assert "restart" not in words


def test_smoothing_keeps_a_straight_line_and_the_length():
  line = [float(x) for x in range(200)]
  assert smooth(line) == pytest.approx(line)
  assert smooth([1.0]) == [1.0]
  zigzag = [float(x % 2) for x in range(200)]
  assert max(abs(x - 0.5) for x in smooth(zigzag)[10:-10]) < 0.1


def test_the_first_steps_leave_the_picture_and_nothing_else_does():
  losses = [9.0, 5.0, *(2.0 + 0.01 * index for index in range(100))]
  assert 2.99 <= without_first_steps(losses) < 5
  assert without_first_steps([2.0, 2.1, 2.2, 2.3]) is None
