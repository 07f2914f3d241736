"""The report: what a run left is on the page, whatever state it was left in."""

import json
import re
import subprocess
import sys
import time

import pytest

from launch.pages import time_charts
from launch.pages.report_text import summary_lines
from tests.reported_runs import killed_run, page_words
from train.telemetry import history
from train.telemetry.goodput import KINDS


def test_a_page_has_every_picture_of_a_whole_run(tmp_path):
  words = page_words(killed_run(tmp_path / "run"))
  for expected in (
    "Loss over tokens",
    "Loss over compute",
    "Loss over wall-clock time",
    "Throughput of all devices",
    "Gradient, before clipping",
    "Learning rate",
    "restart",
    "one: goodput 61% of 5.2 min",
    "share of all time (%)",
    "Memory horizon of the median channel",
    "Memory horizons of the channels now",
    "a row: 256",
    "Saturated recurrence gates",
    "block 0: 160",
    "block 0: 20%",
    "Update of each block over its parameters",
    "40 of 40",
    "held out 2.017",
  ):
    assert expected in words, expected
  assert "nothing of single layers" not in words


def test_two_runs_are_told_apart_by_their_names(tmp_path):
  folders = [killed_run(tmp_path / name, name="same") for name in ("left", "right")]
  words = page_words(*folders)
  assert "left 2.017" in words
  assert "right 2.017" in words
  assert "What the recurrence does: right" in words


def test_a_run_that_was_killed_and_cut_anywhere_is_shown(tmp_path):
  folder = killed_run(tmp_path / "run", outcome=None)
  names = ("metrics.jsonl", "events.jsonl", "statistics.jsonl")
  whole = {name: (folder / name).read_bytes() for name in names}
  for cuts in ((0.99, 0.99, 0.99), (0.5, 0.15, 0.5), (0.15, 0.5, 0), (0, 1, 0.15), (1, 0, 1)):
    for name, share in zip(names, cuts):
      (folder / name).write_bytes(whole[name][: int(share * len(whole[name]))])
    page_words(folder)


def test_what_is_missing_is_said(tmp_path):
  folder = killed_run(tmp_path / "run", statistics=False)
  (folder / "events.jsonl").unlink()
  run = history.read(folder)
  assert run.tokens_per_step is None
  words = page_words(folder)
  assert "no events.jsonl" in words
  assert "no statistics.jsonl yet" in words
  assert "steps instead of tokens" in words
  settings = {"batch_size": 4, "data.row_length": 250, "name": "named", "total_steps": 50}
  (folder / "config.json").write_text(json.dumps(settings))
  run = history.read(folder)
  assert (run.name, run.tokens_per_step, run.total_steps) == ("named", 1000, 50)
  with pytest.raises(ValueError, match="holds no run"):
    history.read(tmp_path)


def test_the_state_of_a_run_in_words(tmp_path):
  assert history.read(killed_run(tmp_path / "a")).state == "complete"
  assert "signal" in history.read(killed_run(tmp_path / "b", outcome="stopped")).state
  assert (
    "NonFiniteError" in history.read(killed_run(tmp_path / "c", outcome="NonFiniteError")).state
  )
  folder = killed_run(tmp_path / "d", outcome=None)
  beat = {"time": time.time(), "kind": "step"}
  (folder / "heartbeat.json").write_text(json.dumps(beat))
  assert history.read(folder).state == "running"
  (folder / "heartbeat.json").write_text(json.dumps({**beat, "time": time.time() - 600}))
  assert history.read(folder).state == "killed 10 min ago"


def test_the_summary_adds_up(tmp_path):
  run = history.read(killed_run(tmp_path / "run"))
  lines = summary_lines(run, "one")
  assert lines[0].endswith("complete, step 40 of 40, 1 restart")
  shares = [float(share) for share in re.findall(r" ([\d.]+)%", lines[2].partition(": ")[2])]
  assert sum(shares) == pytest.approx(100, abs=0.5)
  assert any("160 tokens" in line for line in lines)
  assert set(time_charts.KINDS) == set(KINDS)


def test_the_command_needs_no_jax_and_refuses_in_one_line(tmp_path):
  folder = killed_run(tmp_path / "run")
  code = "import sys, launch.report; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
  command = [sys.executable, "-m", "launch.report", str(folder)]
  output = f"--output={tmp_path / 'out' / 'page.html'}"
  done = subprocess.run([*command, output], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "out" / "page.html").stat().st_size > 10_000
  done = subprocess.run([*command, "nowhere"], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (2, "error: nowhere is not a folder\n")
  for place, words in (
    (tmp_path, "is a folder"),
    (folder / "metrics.jsonl/x/page.html", "be made"),
  ):
    output = f"--output={place}"
    done = subprocess.run([*command, output], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {output}.* {words}.*\n", done.stderr)
