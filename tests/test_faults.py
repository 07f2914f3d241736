"""Bad steps, bad disks and two jobs in one folder, in the real program; and what comes after."""

import json
import os
import pathlib
import shutil
import signal
import time

import pytest

from data import pipeline
from tests import faulty_config
from tests.commands import Commands
from tests.faulty_config import NAN, SPIKE
from train.checkpoint_folder import steps
from train.jsonl import read_jsonl


class Runs:
  """Runs of tests/faulty_config.py in one folder, as commands."""

  def __init__(self, commands: Commands, folder: pathlib.Path, settings: list[str]):
    self.commands, self.folder, self.settings = commands, folder, settings

  def arguments(self, name: str, *settings: str, fault: str = "") -> list[str]:
    config = f"--config=tests/faulty_config.py:{self.folder}" + (f",{fault}" if fault else "")
    return [config, f"--workdir={self.folder / name}", *self.settings, *settings]

  def run(self, name: str, *settings: str, fault: str = "") -> tuple[int, str]:
    """Exit status and output."""
    arguments = self.arguments(name, *settings, fault=fault)
    output = self.folder / f"{name.replace('/', '-')}.txt"
    return self.commands.run("launch.train", arguments, output)

  def start(self, name: str, *settings: str, fault: str = "") -> int:
    arguments = self.arguments(name, *settings, fault=fault)
    return self.commands.start("launch.train", arguments, self.folder / f"{name}.txt")

  def losses(self, name: str) -> dict[int, float]:
    """The loss of each step, as text if it is not finite; each step is told once."""
    records = [r for r in read_jsonl(self.folder / name / "metrics.jsonl") if "train/loss" in r]
    assert len(records) == len({record["step"] for record in records})
    return {record["step"]: record["train/loss"] for record in records}

  def json(self, name: str) -> dict:
    return json.loads((self.folder / name).read_text())


def _wait_for(is_so, seconds=60.0):
  end = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < end, "nothing happened"
    time.sleep(0.01)


def _last_line(output: str) -> str:
  return output.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def bad(commands, tmp_path_factory):
  """Runs on data with one batch that is not finite and two spikes, and where those are."""
  folder = tmp_path_factory.mktemp("bad")
  faulty_config.store(folder / "marked", {50: NAN, 80: SPIKE, 120: SPIKE})
  runs = Runs(commands, folder, [])
  data = faulty_config.data(folder)  # get_config would break this process
  where = {NAN: [], SPIKE: []}
  for batch in range(60):
    rows = pipeline.batch_addresses(data, position=batch, batch_size=8)
    targets = pipeline.read_rows(data, rows).targets_BT
    for mark, batches in where.items():
      batches.extend([batch] * int((targets == mark).sum()))
  # Spikes are looked for from the window's end on; both lie in checkpoints' midst.
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
  _wait_for(note.exists)
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
  assert sorted(losses) == list(range(1, 61))
  assert runs.losses("back") == losses
  assert not (runs.folder / "forewarned" / "bad_steps").exists()
  last = read_jsonl(runs.folder / "back" / "metrics.jsonl")[-1]
  assert last["train/passed_over"] == len(where[NAN]) + len(where[SPIKE])


def test_skipped_steps_are_skipped_again_after_a_restart(bad):
  runs, where = bad
  status, output = runs.run("skip", *SKIP)
  assert status == 0, output
  assert output.count("Skipped: parameters and moments are as before") == 3
  losses = runs.losses("skip")
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


def test_it_stops_at_a_bad_step_that_can_be_looked_at_as_it_was(bad):
  runs, _ = bad
  status, output = runs.run("stop")
  assert status == 1
  assert "step 4: loss nan and gradient norm nan are not finite. Rows: " in _last_line(output)
  assert "Look at it with --replay_step=4" in _last_line(output)
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
  shown = _replayed(runs, "back", *BACK, "--replay_step=52")
  assert "step 52, batch 54, run again from the checkpoint of step 50" in shown
  assert ", bit for bit what the run told" in shown
  assert "the step changed nothing" not in shown


def _replayed(runs: Runs, name: str, *settings: str) -> str:
  """What a replay prints, after making sure that it changed nothing."""
  workdir = runs.folder / name
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  arguments = runs.arguments(name, *settings)
  status, output = runs.commands.run("launch.train", arguments, runs.folder / "replay.txt")
  assert status == 0, output
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
  return output


@pytest.fixture(scope="module")
def good(commands, tmp_path_factory):
  """Runs on data without a bad step; one of them is undisturbed."""
  folder = tmp_path_factory.mktemp("good")
  faulty_config.store(folder / "marked", {})
  runs = Runs(commands, folder, [])
  status, output = runs.run("straight")
  assert status == 0, output
  return runs


@pytest.mark.parametrize(
  ("fault", "named"),
  [("full", "File too large"), ("read_only", "Permission denied"), ("failing", "Input/output")],
)
def test_a_failing_disk_stops_the_run_which_goes_on_once_it_is_well(good, fault, named):
  status, output = good.run(fault, fault=fault)
  assert status == 1
  directory = good.folder / fault / "checkpoints"
  line = _last_line(output)
  assert f"the checkpoint of step 30 could not be written to {directory}" in line
  assert named in line
  assert "The last complete one is that of step 20: free space, or mend what is named" in line
  assert max(steps(directory)) == 20
  directory.chmod(0o755)
  status, output = good.run(fault)
  assert status == 0, output
  assert "restored step 20" in output
  assert good.losses(fault) == good.losses("straight")


def test_a_save_slower_than_the_steps_between_is_waited_for(good):
  status, output = good.run("slow", fault="slow")
  assert status == 0
  assert "step 40: waiting for the checkpoint of step 30; save less often" in output
  assert steps(good.folder / "slow" / "checkpoints") == [10, 20, 30, 40, 50, 60]
  assert good.losses("slow") == good.losses("straight")


def test_a_workdir_that_cannot_be_one_is_one_line(good):
  (good.folder / "file").write_text("")
  status, output = good.run("file/run")
  assert status == 1
  assert "file/run: Not a directory" in output
  assert "a file is where a folder has to be: move it, or use another --workdir" in output
  assert "Traceback" not in output


def test_a_truncated_newest_checkpoint_is_refused_or_the_one_before_is_used(good):
  shutil.copytree(good.folder / "straight", good.folder / "truncated")
  directory = good.folder / "truncated" / "checkpoints"
  files = (directory / "00000060").rglob("*")
  largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  status, output = good.run("truncated")
  assert status == 1
  assert "To go on from that of step 50: checkpoint.on_damage=previous" in _last_line(output)
  largest.unlink()
  status, output = good.run("truncated")
  assert status == 1
  # A read that fails leaves others under way, which say nothing when they end.
  assert "Traceback" not in output
  assert "To go on from that of step 50: checkpoint.on_damage=previous" in _last_line(output)
  status, output = good.run("truncated", "--config.checkpoint.on_damage=previous")
  assert status == 0, output
  assert "restored step 50" in output
  assert good.losses("truncated") == good.losses("straight")
  assert steps(directory) == [10, 20, 30, 40, 50, 60]


def test_a_second_job_on_a_workdir_is_refused_and_touches_nothing(good, tmp_path):
  """And neither a lock that a killed job left, nor a lock that does not hold, is an obstacle."""
  workdir = good.folder / "two"
  pid = good.start("two", "--config.total_steps=2000")
  _wait_for(lambda: steps(workdir / "checkpoints"))
  os.kill(pid, signal.SIGSTOP)
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  other = Commands()
  try:
    arguments = good.arguments("two", "--config.name=other")
    status, output = other.run("launch.train", arguments, tmp_path / "other.txt")
    assert status == 1
    expected = rf"checkpoints is in use by a run (process {pid} on {os.uname().nodename} since 20"
    assert expected in _last_line(output)
    assert "wait for it, stop it, or use another workdir" in _last_line(output)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    # As where locks do not reach another machine: the lock names the other one.
    (workdir / "checkpoints" / "lock").write_text("process 7 on elsewhere since then\n")
    os.kill(pid, signal.SIGCONT)
    assert good.commands.wait() == 1
    line = _last_line((good.folder / "two.txt").read_text())
    assert "checkpoints was taken by another run (process 7 on elsewhere since then)" in line
  finally:
    other.close()
