"""What a report shows is what was measured: units, places, order, and text as text."""

import html
import json
import re

from launch import report_page, svg
from tests.reported_runs import killed_run, page_words, write
from train import history


def _edited(folder, name, edit):
  lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
  for line in lines:
    edit(line)
  write(folder / name, lines)


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
    words = page_words(*one).split("\n")  # fails where a tag is none of the page's own
    assert "a<i> & co: 2 <u> chips, " in words
    assert any(word.startswith("a<i> & co: goodput") for word in words)
    page = report_page.page([history.read(folder) for folder in one], command="")
    assert html.escape("a<i> & co") in page
    assert "<i>" not in page
    assert "<u>" not in page
