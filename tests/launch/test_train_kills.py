"""`python -m launch.train` killed, told to stop, and started again: as if nothing had happened."""

import math
import os
import random
import signal
import time

import pytest

from launch.pages import report_page
from tests import tiny
from train.checkpoint.storage import steps
from train.telemetry import goodput, history
from train.workdir.jsonl import read_jsonl

# One worker for all of them: they share the runs of the fixtures.
pytestmark = pytest.mark.xdist_group("train_kills")

NUM_KILLS = 6


def _arguments(folder, name):
  return [f"--config=tests/tiny_config.py:{folder}", f"--workdir={folder / name}"]


def _losses(workdir):
  """The loss of each step; a step that a restart did again must give the same bits."""
  losses = {}
  for record in read_jsonl(workdir / "metrics.jsonl"):
    if "train/loss" in record:
      assert losses.setdefault(record["step"], record["train/loss"]) == record["train/loss"]
  return losses


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
  """Where the data of all runs is, and the losses of one that nothing happened to."""
  folder = tmp_path_factory.mktemp("train")
  tiny.run(folder)
  arguments = [*_arguments(folder, "straight"), "--config.statistics.every=20"]
  status, output = commands.run("launch.train", arguments, folder / "output")
  assert status == 0, output
  losses = _losses(folder / "straight")
  assert sorted(losses) == list(range(1, 61))
  return folder, losses


def _wait_for(path_exists, seconds=60.0):
  end = time.monotonic() + seconds
  while not path_exists():
    assert time.monotonic() < end, "nothing happened"
    time.sleep(0.02)


def test_killed_at_random_moments_the_losses_are_the_undisturbed_ones(commands, undisturbed):
  folder, expected = undisturbed
  workdir, moments, gained = folder / "killed", random.Random(1), 0
  for kill in range(NUM_KILLS):
    before = max(steps(workdir / "checkpoints"), default=0)
    assert before < 60, "the run was too fast to be killed"
    pid = commands.start("launch.train", _arguments(folder, "killed"), folder / f"output{kill}")
    if kill % 3 == 2:
      time.sleep(moments.uniform(0.0, 1.0))  # while it starts, compiles and restores
    else:
      # Until it has come further than it was, then a little longer: in a step, or in a save.
      reached = before + 2
      _wait_for(lambda reached=reached: max(steps(workdir / "checkpoints"), default=0) >= reached)
      time.sleep(moments.uniform(0.0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert commands.wait() == -signal.SIGKILL
    newest = max(steps(workdir / "checkpoints"), default=0)
    assert newest >= before
    gained += newest > before
  assert gained >= 3
  # A disk that did not keep the ends of the files either: half lines, half a file.
  for name, torn in [("metrics.jsonl", '{"step": 58, "train/lo'), ("events.jsonl", '{"time": 1')]:
    with (workdir / name).open("a") as file:
      file.write(torn)
  (workdir / "config.json").write_text('{"name": "ti')
  torn_run = history.read(workdir)
  assert torn_run.step >= newest
  assert ">restart<" in report_page.page([torn_run], command="")
  status, output = commands.run("launch.train", _arguments(folder, "killed"), folder / "output")
  assert status == 0, output
  assert f"restored step {newest}" in output
  assert _losses(workdir) == expected
  told = [record["step"] for record in read_jsonl(workdir / "metrics.jsonl")]
  assert told == sorted(expected)  # each once, in order
  log = goodput.read(workdir)
  assert log.outcome == "complete"
  assert log.starts[-1].step == newest
  seconds = log.seconds()
  assert sum(seconds.values()) == pytest.approx(log.pieces[-1].end - log.pieces[0].start)
  assert min(seconds[kind] for kind in ("init", "compile", "restore", "step", "checkpoint")) > 0
  kept = [piece.steps for piece in log.pieces if piece.kind == "step" and piece.steps]
  assert sorted(step for first, last in kept for step in range(first, last + 1)) == sorted(expected)
  runs = [history.read(workdir), history.read(folder / "straight")]
  assert report_page.labels(runs) == ["killed", "straight"]
  page = report_page.page(runs, command="")
  assert f"{len(runs[0].restarts)} restarts<" in page or ">restart<" in page
  assert "What the recurrence does: straight" in page


def test_statistics_are_written_at_their_interval(undisturbed):
  folder, _ = undisturbed
  records = {r["step"]: r for r in read_jsonl(folder / "straight" / "metrics.jsonl")}
  lines = read_jsonl(folder / "straight" / "statistics.jsonl")
  assert [line["step"] for line in lines] == [20, 40, 60]
  for line in lines:
    ends = (line["embedding"]["grad_norm"], line["final_norm"]["grad_norm"])
    whole = math.hypot(*line["grad_norm"], *ends)
    assert whole == pytest.approx(records[line["step"]]["train/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_told_to_stop_it_saves_and_says_start_me_again(commands, undisturbed, number):
  folder, expected = undisturbed
  workdir = folder / number.name
  pid = commands.start("launch.train", _arguments(folder, number.name), folder / "output")
  _wait_for(lambda: steps(workdir / "checkpoints"))
  os.kill(pid, number)
  assert commands.wait() == 75
  told = (folder / "output").read_text()
  assert f"{number.name}: saving" in told
  assert "stopped, the same command goes on" in told
  stopped_at = max(steps(workdir / "checkpoints"))
  assert max(_losses(workdir)) == stopped_at < 60
  status, output = commands.run("launch.train", _arguments(folder, number.name), folder / "output")
  assert status == 0, output
  assert f"restored step {stopped_at}" in output
  assert _losses(workdir) == expected
  (workdir / "loss.png").unlink()  # as when it was killed after its last checkpoint
  status, output = commands.run("launch.train", _arguments(folder, number.name), folder / "output")
  assert status == 0
  assert "the run is complete" in output
  assert (workdir / "loss.png").exists()


def test_told_to_stop_by_several_at_one_moment_it_saves(commands, undisturbed):
  folder, _ = undisturbed
  workdir = folder / "several"
  settings = ["--config.checkpoint.temporary_minutes=None", "--config.total_steps=100000"]
  arguments = [*_arguments(folder, "several"), *settings]
  pid = commands.start("launch.train", arguments, folder / "output")
  _wait_for(lambda: 20 in steps(workdir / "checkpoints"))
  # As of Slurm, which tells every process of a job, and of the supervisor, which passes it on.
  os.kill(pid, signal.SIGTERM)
  os.kill(pid, signal.SIGINT)
  assert commands.wait() == 75, (folder / "output").read_text()
  assert max(_losses(workdir)) == max(steps(workdir / "checkpoints"))
