"""A report shows what was measured: units, positions, order, and text as text."""

import html
import json
import math
import re

import pytest

from launch.pages import layer_charts, report_page, time_charts
from launch.pages.report_text import summary_lines
from models.layers.rg_lru_statistics import STATISTICS
from tests import drawn
from tests.reported_runs import QUANTILES, killed_run, page_words, write
from train.drawing import colors
from train.telemetry import history


def _edited(folder, name, edit):
  lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
  for line in lines:
    edit(line)
  write(folder / name, lines)


def _pictures(page):
  """title -> picture of a page."""
  return {
    html.unescape(re.search(r'aria-label="([^"]*)"', picture)[1]): picture
    for picture in re.findall(r"<svg.*?</svg>", page, re.S)
  }


def test_runs_in_a_picture_share_a_unit_though_one_does_not_know_its_tokens(tmp_path):
  folders = [
    killed_run(tmp_path / name, name=name, statistics=False) for name in ("knows", "does not")
  ]
  (folders[1] / "events.jsonl").unlink()
  runs = [history.read(folder) for folder in folders]
  assert [run.tokens_per_step for run in runs] == [1000, None]
  pictures = _pictures(report_page.page(runs, command=""))
  assert not any("over tokens" in title for title in pictures)
  for title in ("Loss over steps; dots: held out", "Throughput of all devices"):
    assert "steps" in drawn.words(pictures[title])
    ends = [places[-1][0] for _, places in drawn.lines(pictures[title]) if len(places) == 40]
    assert len(ends) >= 2
    assert len(set(ends)) == 1
  # A run without tokens has no FLOPs either: only the other has curves there, in its color.
  for order in (runs, runs[::-1]):
    picture = _pictures(report_page.page(order, command=""))["Loss over compute"]
    color = colors.DISTINCT[order.index(runs[0])]
    assert drawn.color_of(picture, "knows 2.017") == color
    assert not any("does not" in word for word in drawn.words(picture))
    assert {line_color for line_color, places in drawn.lines(picture) if len(places) > 5} == {color}
  (tokens,) = [
    picture
    for title, picture in _pictures(report_page.page(runs[:1], command="")).items()
    if title == "Loss over tokens"
  ]
  assert "tokens" in drawn.words(tokens)


def test_a_run_has_the_color_of_its_family_in_every_picture(tmp_path):
  names = ("hawk-1b", "griffin-1b")
  folders = [killed_run(tmp_path / name, name=name, statistics=False) for name in names]
  runs = [history.read(folder) for folder in folders]
  pictures = _pictures(report_page.page(runs, command=""))
  for title in ("Loss over compute", "Throughput of all devices", "Learning rate"):
    for name, family in zip(names, ("hawk", "griffin")):
      (word,) = [word for word in drawn.words(pictures[title]) if word.startswith(name)]
      assert drawn.color_of(pictures[title], word) == colors.FAMILIES[family].color


def test_tooltips_have_what_was_logged(tmp_path):
  run = history.read(killed_run(tmp_path / "run"))
  pictures = _pictures(report_page.page([run], command=""))
  *_, last = drawn.tooltips(pictures["Loss over tokens"])
  assert last[2].split("\n") == [
    "tokens: 40k",
    f"training: {6 / 40**0.3:.4g}",
    f"held out: {6.1 / 40**0.3:.4g}",
  ]
  *_, last = drawn.tooltips(pictures["Memory horizon of the median channel"])
  assert last[2].split("\n") == ["tokens: 40k", "block 0: 160"]
  (block,) = drawn.tooltips(pictures["Memory horizons of the channels now"])
  assert "95 %: 640 tokens" in block[2]
  assert "median with the gate wide open: 4" in block[2]


def test_names_are_text_wherever_they_stand(tmp_path):
  folders = [killed_run(tmp_path / name, name=f"{name}<i> & co", statistics=False) for name in "ab"]
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


def test_the_horizons_now_stand_where_they_are(tmp_path):
  run = history.read(killed_run(tmp_path / "run"))
  (declared,) = [one for one in STATISTICS.pictures if one.draw == "quantiles"]
  picture = layer_charts._distribution(run, declared, 420).svg()
  words = drawn.words(picture)
  tops = [words[name][1] for name in ("95 % of channels", "75 %", "median", "25 %", "5 %")]
  assert tops == sorted(tops)
  # Of 40, 80, 160, 320 and 640 tokens, on a logarithmic axis: evenly apart.
  color = colors.in_order(0, 2)
  (((_, bottom), (_, top)),) = [places for line, places in drawn.lines(picture) if line == color]
  octave = (bottom - top) / 4
  ((_, _, upper, _, lower),) = [area for area in drawn.areas(picture) if area[0] == color]
  assert upper == pytest.approx(top + octave, abs=0.2)
  assert lower == pytest.approx(bottom - octave, abs=0.2)
  # With its gate open the median channel has 4.
  (ring,) = [y for mark, _, y in drawn.marks(picture) if mark == color]
  assert ring == pytest.approx(bottom + octave * math.log2(40 / 4), abs=0.5)


def test_an_update_is_relative_to_its_parameters(tmp_path):
  folder = killed_run(tmp_path / "run")
  norms = {"param_norm": [4.0, 4.0], "update_norm": [1.0, 3.0]}
  _edited(folder, "statistics.jsonl", lambda line: line.update(norms))
  words = page_words(folder)
  assert "block 0: 0.25" in words
  assert "block 1: 0.75" in words


def test_the_bar_says_what_each_time_was():
  seconds = dict.fromkeys(time_charts.KINDS, 0.0) | {"step": 60.0, "checkpoint": 30.0}
  picture = time_charts.bar(seconds | {"restore": 10.0}, "A title", 860).svg()
  expected = {
    "training steps, kept": (60, "60.0%, 60 s"),
    "checkpoints": (30, "30.0%, 30 s"),
    "restoring": (10, "10.0%, 10 s"),
  }
  tooltips = {words: right - left for left, right, words in drawn.tooltips(picture)}
  assert tooltips.keys() == {f"{name}: {words}" for name, (_, words) in expected.items()}
  written = {" ".join(word.split()) for word in drawn.words(picture)}
  for name, (share, words) in expected.items():
    assert f"{name} {words}" in written
    assert tooltips[f"{name}: {words}"] == pytest.approx(832 * share / 100, abs=0.2)
    assert f"{share}%" in written


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
  # One slow step does not represent a run.
  assert "tokens/s in the median 5,000" in words
  assert f"loss {6 / 40**0.3:.4f}, held out {6.1 / 40**0.3:.4f}" in words
  assert re.search(r"goodput 6\d\.\d% of 5\.2 min", words)
  assert "from 4 in block 0 to 40 in block 2" in words


def test_runs_of_one_name_in_folders_of_one_name_are_told_apart(tmp_path):
  runs = [history.read(killed_run(tmp_path / place / "run", name="same")) for place in "ab"]
  assert report_page.labels(runs) == [str(tmp_path / place / "run") for place in "ab"]
