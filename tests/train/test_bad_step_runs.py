"""Bad steps in the real program: stopped at, skipped, rolled back, looked at again."""

import json
import os
import signal

import numpy as np
import pytest

from data import pipeline
from tests import faulty_config
from tests.faulty_config import NAN, SPIKE
from tests.faulty_runs import Runs, last_line, wait_for
from tests.tolerances import assert_close
from train.checkpoint.storage import steps
from train.workdir.jsonl import read_jsonl

# One worker for all of them: they share the runs of the fixtures.
pytestmark = pytest.mark.xdist_group("bad_step_runs")


@pytest.fixture(scope="module")
def bad(commands, tmp_path_factory):
  """Runs on data with one batch that is not finite and two spikes, and where those are."""
  folder = tmp_path_factory.mktemp("bad")
  faulty_config.store(folder / "marked", {50: NAN, 113: SPIKE, 120: SPIKE})
  runs = Runs(commands, folder, ["--config.total_steps=40"])
  data = faulty_config.data(folder)  # get_config would break this process
  where = {NAN: [], SPIKE: []}
  for batch in range(60):
    rows = pipeline.batch_addresses(data, position=batch, batch_size=8)
    targets = pipeline.read_rows(data, rows).targets_BT
    for mark, batches in where.items():
      marked, _ = np.nonzero(targets == mark)
      batches.extend([batch] * len(marked))
      assert (marked >= 4).all()  # with two processes, the second one reads all of them
  # Spikes are detected once the window is full; both lie between two checkpoints.
  assert (where[NAN], where[SPIKE]) == ([3], [15, 30])
  return runs, where


BACK = ("--config.bad_steps.non_finite=rollback", "--config.bad_steps.spike=rollback")
SKIP = ("--config.bad_steps.non_finite=skip", "--config.bad_steps.spike=skip")


@pytest.fixture(scope="module")
def rolled_back(bad):
  """A run that went back for each bad batch, and was killed right after it had noted the first."""
  runs, _ = bad
  pid = runs.start("back", *BACK)
  note = runs.folder / "back" / "passed_over.json"
  wait_for(note.exists)
  os.kill(pid, signal.SIGKILL)
  assert runs.commands.wait() == -signal.SIGKILL
  status, output = runs.run("back", *BACK)
  assert status == 0, output
  return output


def test_a_rolled_back_run_is_the_one_that_never_read_those_rows(bad, rolled_back):
  runs, where = bad
  rollbacks = runs.json("back/passed_over.json")["rollbacks"]
  assert [note["batches"] for note in rollbacks] == [[3], [15], [30]]
  assert [note["checkpoint"] for note in rollbacks] == [0, 10, 20]
  assert "passing over batches [3] (passed_over.json)" in rolled_back
  assert "Going back to the checkpoint of step 20 and passing over batches [30]" in rolled_back
  (runs.folder / "forewarned").mkdir()
  known = json.dumps({"rollbacks": rollbacks})
  (runs.folder / "forewarned" / "passed_over.json").write_text(known)
  status, output = runs.run("forewarned")  # which would stop at the first bad step
  assert status == 0, output
  losses = runs.losses("forewarned")
  assert sorted(losses) == list(range(1, 41))
  assert runs.losses("back") == losses
  assert not (runs.folder / "forewarned" / "bad_steps").exists()
  last = read_jsonl(runs.folder / "back" / "metrics.jsonl")[-1]
  assert last["train/passed_over"] == len(where[NAN]) + len(where[SPIKE])


@pytest.fixture(scope="module")
def skipped(bad):
  """A run that went on without each bad batch: its losses, and what it said."""
  runs, _ = bad
  status, output = runs.run("skip", *SKIP)
  assert status == 0, output
  return runs.losses("skip"), output


def test_skipped_steps_are_skipped_again_after_a_restart(bad, skipped):
  runs, where = bad
  losses, output = skipped
  assert output.count("Skipped: parameters and moments are as before") == 3
  assert losses[where[NAN][0] + 1] == "nan"
  # From the middle: what a spike is rests on steps from before the restart.
  workdir = runs.folder / "skip"
  for step in steps(workdir / "checkpoints")[2:]:
    (workdir / "checkpoints" / f"{step:08d}").rename(runs.folder / f"aside-{step}")
  status, output = runs.run("skip", *SKIP)
  assert status == 0, output
  assert "restored step 20" in output
  assert "step 31: loss" in output
  assert runs.losses("skip") == losses
  assert read_jsonl(workdir / "metrics.jsonl")[-1]["train/skipped_steps"] == 3


@pytest.fixture(scope="module")
def stopped(bad):
  """What a run said that stopped at the first bad batch."""
  runs, _ = bad
  status, output = runs.run("stop")
  assert status == 1
  return output


def test_it_stops_at_a_bad_step_that_can_be_looked_at_as_it_was(bad, stopped):
  runs, output = bad[0], stopped
  assert "step 4: loss nan and gradient norm nan are not finite. Rows: " in last_line(output)
  assert "Look at it with --replay_step=4" in last_line(output)
  record = runs.json("stop/bad_steps/00000004-00000003.json")
  shown = _replayed(runs, "stop", "--replay_step=4")
  assert "step 4, batch 3, run again from the beginning" in shown
  assert "loss       nan, bit for bit what the run told" in shown
  # The row with the mark is the worst, and the text shows it.
  worst = shown.splitlines()[shown.splitlines().index("rows, the worst 8 of 8") + 2]
  assert worst.split()[0] == "nan"
  assert f"{record['rows'][_marked_row(runs, 3)]['row']} " in worst
  assert "nan         embedding/table_VD" in shown


def _marked_row(runs: Runs, batch: int) -> int:
  data = faulty_config.data(runs.folder)
  rows = pipeline.batch_addresses(data, position=batch, batch_size=8)
  return int((pipeline.read_rows(data, rows).targets_BT == NAN).any(axis=1).argmax())


def test_a_step_that_was_rolled_back_is_replayed_with_its_own_batch(bad, rolled_back):
  runs, _ = bad
  shown = _replayed(runs, "back", *BACK, "--replay_step=15")
  assert "step 15, batch 15, run again from the checkpoint of step 10" in shown
  assert ", bit for bit what the run told" in shown
  assert "limits     loss" in shown
  assert "the step changed nothing" in shown
  assert "as recorded in" in shown
  # A good one, after all of them: of the batches that are left.
  shown = _replayed(runs, "back", *BACK, "--replay_step=32")
  assert "step 32, batch 34, run again from the checkpoint of step 30" in shown
  assert ", bit for bit what the run told" in shown
  assert "the step changed nothing" not in shown


def _replayed(runs: Runs, name: str, *settings: str) -> str:
  """What a replay prints, after making sure that it changed nothing."""
  before = _files(runs, name)
  arguments = runs.arguments(name, *settings)
  status, output = runs.commands.run("launch.train", arguments, runs.folder / "replay.txt")
  assert status == 0, output
  assert _files(runs, name) == before
  return output


def _files(runs: Runs, name: str) -> dict:
  return {path: path.stat().st_mtime_ns for path in (runs.folder / name).rglob("*")}


def test_two_processes_skip_and_roll_back_as_one_does(bad, rolled_back, skipped):
  """The bad rows are all of process 1."""
  runs, _ = bad
  for one, two, settings in [("back", "back-two", BACK), ("skip", "skip-two", SKIP)]:
    status, output = runs.local_sh(two, *settings)
    assert status == 0, output
    expected = skipped[0] if one == "skip" else runs.losses(one)
    _assert_same_losses(runs.losses(two), expected)
    assert _bad_rows(runs, two) == _bad_rows(runs, one)
  notes = [runs.json(f"{name}/passed_over.json")["rollbacks"] for name in ("back-two", "back")]
  for key in ("step", "checkpoint", "batches"):
    assert [note[key] for note in notes[0]] == [note[key] for note in notes[1]]


def test_two_processes_stop_as_one_and_the_supervisor_sees_that_it_would_come_again(bad, stopped):
  runs, _ = bad
  status, output = runs.local_sh("stop-two", restarts=9)
  assert status == 1, output
  why = "step 4: loss nan and gradient norm nan are not finite"
  assert f"giving up: the same failure 3 times at step 4: BadStepError: {why}" in output
  told = last_line(stopped).partition("Rows: ")[2].partition(". Written to")[0]
  assert output.count(f"{why}. Rows: {told}. Written to") >= 3
  assert _bad_rows(runs, "stop-two") == _bad_rows(runs, "stop")


def test_what_two_processes_recorded_is_replayed_by_two_and_by_one(bad):
  runs, _ = bad
  if not (runs.folder / "back-two").exists():
    assert runs.local_sh("back-two", *BACK)[0] == 0
  before = _files(runs, "back-two")
  status, two = runs.local_sh("back-two", *BACK, "--replay_step=15")
  assert status == 0, two
  assert _files(runs, "back-two") == before
  one = _replayed(runs, "back-two", *BACK, "--replay_step=15")
  for shown in (one, two):
    assert shown.count("step 15, batch 15, run again from the checkpoint of step 10") == 1
    assert shown.count("the step changed nothing") == 1
  assert ", bit for bit what the run told" in two
  # The rows in the same order, the worst first, with the same text.
  assert _shown_rows(two) == _shown_rows(one)
  assert len(_shown_rows(one)) == 8


def _assert_same_losses(actual, expected):
  assert actual.keys() == expected.keys()
  for step, loss in expected.items():
    if loss == "nan":
      assert actual[step] == "nan"
    else:
      assert_close(actual[step], loss, dtype="float32", reduction=1024)


def _shown_rows(shown: str) -> list[list[str]]:
  """Source, row, documents and text of each row of a replay."""
  told = [line.removeprefix("[0] ") for line in shown.splitlines() if not line.startswith("[1]")]
  lines = [line.split() for line in told]
  start = lines.index(["rows,", "the", "worst", "8", "of", "8"]) + 2
  return [line[1:] for line in lines[start : start + 8]]


def _bad_rows(runs: Runs, name: str) -> dict[str, list]:
  """By the name of the record of each bad step, its rows."""
  folder = runs.folder / name / "bad_steps"
  return {path.name: json.loads(path.read_text())["rows"] for path in folder.iterdir()}
