"""What a report shows is what was measured: units, places, order, and text as text."""

import html
import json
import math
import re

import pytest

from launch.pages import layer_charts, report_page, svg, time_charts
from launch.pages.line_chart import Axis, Line, _thinned, chart
from launch.pages.report_text import summary_lines
from tests.reported_runs import QUANTILES, killed_run, page_words, write
from train.telemetry import history


def _edited(folder, name, edit):
  lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
  for line in lines:
    edit(line)
  write(folder / name, lines)


def _words(picture):
  """word -> its place in a picture, (x, y)."""
  found = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)<', picture)
  return {html.unescape(word): (float(x), float(y)) for x, y, word in found}


def _points(picture):
  """Of each line of a picture its places, (x, y)."""
  return [
    [tuple(map(float, point.split(","))) for point in points.split()]
    for points in re.findall(r'points="([^"]*)"', picture)
  ]


def test_runs_in_a_picture_share_a_unit_though_one_does_not_know_its_tokens(tmp_path):
  folders = [killed_run(tmp_path / name, name=name) for name in ("knows", "does not")]
  (folders[1] / "events.jsonl").unlink()
  runs = [history.read(folder) for folder in folders]
  assert [run.tokens_per_step for run in runs] == [1000, None]
  page = report_page.page(runs, command="")
  pictures = dict(re.findall(r"<h3>([\w -]+) <span>.*?</h3>(<svg.*?</svg>)", page, re.S))
  assert "over tokens" not in pictures
  for title in ("over steps", "Throughput", "Gradient norm"):
    assert ">steps</text>" in pictures[title]
    ends = [points[-1][0] for points in _points(pictures[title]) if len(points) == 40]
    assert len(ends) >= 2
    assert len(set(ends)) == 1
  # Who knows no tokens knows no FLOPs: only the other has its curves there, in its color.
  for order in (runs, runs[::-1]):
    page = report_page.page(order, command="")
    (picture,) = re.findall(r"<h3>over compute .*?(<svg.*?</svg>)", page, re.S)
    color = svg.COLORS[order.index(runs[0])]
    assert re.findall(r'fill="(#\w+)">((?:knows|does not) [^<]*)<', picture) == [
      (color, "knows 2.017")
    ]
  assert ">tokens</text>" in report_page.page(runs[:1], command="")


def test_names_are_text_wherever_they_stand(tmp_path):
  folders = [killed_run(tmp_path / name, name=f"{name}<i> & co") for name in "ab"]
  for folder in folders:
    _edited(
      folder, "events.jsonl", lambda line: "devices" in line and line.update(devices="2 <u> chips")
    )
  for one in (folders, folders[:1]):
    # The page's words fail where a tag is none of its own.
    words = page_words(*one).split("\n")
    assert "a<i> & co: 2 <u> chips, " in words
    assert any(word.startswith("a<i> & co: goodput") for word in words)
    page = report_page.page([history.read(folder) for folder in one], command="report <i>")
    assert html.escape("a<i> & co") in page
    assert "<i>" not in page
    assert "<u>" not in page


def test_the_axes_of_a_page_have_their_units(tmp_path):
  run = history.read(killed_run(tmp_path / "run"))
  axis, scale = report_page._clock_axis([run])
  assert (axis.label, scale) == ("minutes since the first start", 60.0)
  # The restart was 200 s after the start, at step 20 of 1000 tokens each.
  assert [mark.x for mark in report_page._clock_marks([run], scale)] == [
    pytest.approx(200 / 60, abs=0.01)
  ]
  axis, x_of = report_page._progress([run])
  assert axis.label == "tokens"
  assert [mark.x for mark in report_page._step_marks([run], x_of)] == [20_000]
  assert report_page._flops(run, 40) == pytest.approx(40_000 * 6e6)


@pytest.mark.parametrize(
  ("scale", "values"), [("linear", (0.0, 5.0, 10.0)), ("log", (1.0, 10.0, 100.0))]
)
def test_a_point_stands_where_its_value_is(scale, values):
  y = Axis(scale=scale, low=values[0], high=values[-1])
  line = Line(list(enumerate(values)), "#000", "a")
  (places,) = [
    places
    for places in _points(chart([line], x=Axis(), y=y, width=400, height=240))
    if len(places) == 3
  ]
  (left, bottom), (_, middle), (right, top) = places
  assert left < right
  assert top < bottom  # a picture counts downward
  assert middle == pytest.approx((top + bottom) / 2, abs=0.2)


def test_no_peak_is_lost_among_very_many_points():
  points = [(float(x), 1.0) for x in range(20_000)]
  points[12_345] = (12_345.0, 9.0)
  points[4_321] = (4_321.0, -9.0)
  kept = _thinned(points)
  assert len(kept) < 2_000
  assert {points[12_345], points[4_321], points[0], points[-1]} <= set(kept)
  assert kept == sorted(kept)


def test_the_horizons_now_stand_where_they_are(tmp_path):
  run = history.read(killed_run(tmp_path / "run"))
  picture = layer_charts._distribution(run, 420)
  words = _words(picture)
  tops = [words[name][1] for name in ("95 % of channels", "75 %", "median", "25 %", "5 %")]
  assert tops == sorted(tops)
  # Of 40, 80, 160, 320 and 640 tokens, on a logarithmic axis: evenly apart.
  (span,) = [
    places
    for places in _points(picture)
    if places[0][0] == places[1][0] and places[0][1] > places[1][1]
  ]
  (bottom, top) = (y for _, y in span)
  octave = (bottom - top) / 4
  ((y, height),) = re.findall(
    r'<rect x="[^"]*" y="([\d.]+)" width="16.0" height="([\d.]+)"', picture
  )
  assert float(y) == pytest.approx(top + octave, abs=0.2)
  assert float(height) == pytest.approx(2 * octave, abs=0.2)
  # With its gate open the median channel has 4.
  (ring,) = re.findall(r'<circle cx="[^"]*" cy="([\d.]+)"', picture)
  assert float(ring) == pytest.approx(bottom + octave * math.log2(40 / 4), abs=0.5)


def test_an_update_is_relative_to_its_parameters(tmp_path):
  folder = killed_run(tmp_path / "run")
  norms = {"param_norm": [4.0, 4.0], "update_norm": [1.0, 3.0]}
  _edited(folder, "statistics.jsonl", lambda line: line.update(norms))
  words = page_words(folder)
  assert "block 0: 0.25" in words
  assert "block 1: 0.75" in words


def test_the_bar_says_what_each_time_was():
  seconds = dict.fromkeys(time_charts.KINDS, 0.0) | {"step": 60.0, "checkpoint": 30.0}
  words = _words(time_charts.bar(seconds | {"restore": 10.0}, 860))
  assert {
    "training steps, kept  60.0%, 60 s",
    "checkpoints  30.0%, 30 s",
    "restoring  10.0%, 10 s",
  } <= words.keys()


def test_a_start_that_was_killed_before_its_first_step_is_no_restart(tmp_path):
  folder = killed_run(tmp_path / "run")
  lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
  start = next(index for index, line in enumerate(lines) if line["kind"] == "start" and index)
  lines.insert(start, lines[start] | {"time": lines[start]["time"] - 10})
  write(folder / "events.jsonl", lines)
  assert len(history.read(folder).restarts) == 1


def test_the_summary_has_the_numbers_of_the_run(tmp_path):
  folder = killed_run(tmp_path / "run")

  def slow(line):
    if line["step"] == 7 and "train/loss" in line:
      line["train/tokens_per_second"] = 1.0

  longer = [10 * horizon for horizon in QUANTILES]
  _edited(folder, "metrics.jsonl", slow)
  _edited(folder, "statistics.jsonl", lambda line: line.update(horizon=[QUANTILES, None, longer]))
  words = "\n".join(summary_lines(history.read(folder), "one"))
  # One slow step is not what a run is like.
  assert "tokens/s in the median 5,000" in words
  assert f"loss {6 / 40**0.3:.4f}, held out {6.1 / 40**0.3:.4f}" in words
  assert re.search(r"goodput 6\d\.\d% of 5\.2 min", words)
  assert "from 4 in block 0 to 40 in block 2" in words


def test_runs_of_one_name_in_folders_of_one_name_are_told_apart(tmp_path):
  runs = [history.read(killed_run(tmp_path / place / "run", name="same")) for place in "ab"]
  assert report_page.labels(runs) == [str(tmp_path / place / "run") for place in "ab"]
