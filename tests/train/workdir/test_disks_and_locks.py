"""Bad disks and two jobs in one folder, in the real program; and what comes after."""

import os
import pathlib
import shutil
import signal

import pytest

from tests import faulty_config
from tests.faulty_runs import Runs, last_line, wait_for
from train.checkpoint.storage import steps


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
  assert "Traceback" not in output
  directory = good.folder / fault / "checkpoints"
  line = last_line(output)
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
  assert "To go on from that of step 50: checkpoint.on_damage=previous" in last_line(output)
  largest.unlink()
  status, output = good.run("truncated")
  assert status == 1
  # A read that fails leaves others under way, which say nothing when they end.
  assert "Traceback" not in output
  assert "To go on from that of step 50: checkpoint.on_damage=previous" in last_line(output)
  status, output = good.run("truncated", "--config.checkpoint.on_damage=previous")
  assert status == 0, output
  assert "restored step 50" in output
  assert good.losses("truncated") == good.losses("straight")
  assert steps(directory) == [10, 20, 30, 40, 50, 60]


def _is_stopped(pid: int) -> bool:
  """Whether every thread of a process has taken SIGSTOP: kill() does not wait for that."""
  stats = [path.read_text() for path in pathlib.Path(f"/proc/{pid}/task").glob("*/stat")]
  return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def test_a_second_job_on_a_workdir_is_refused_and_touches_nothing(good, tmp_path):
  """Neither a lock that a killed job left, nor a lock that does not work, is an obstacle."""
  workdir = good.folder / "two"
  pid = good.start("two", "--config.total_steps=2000")
  wait_for(lambda: steps(workdir / "checkpoints"))
  os.kill(pid, signal.SIGSTOP)
  wait_for(lambda: _is_stopped(pid))
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  arguments = good.arguments("two", "--config.name=other")
  status, output = good.commands.run("launch.train", arguments, tmp_path / "other.txt")
  assert status == 1
  expected = rf"checkpoints is in use by a run (process {pid} on {os.uname().nodename} since 20"
  assert expected in last_line(output)
  assert "wait for it, stop it, or use another workdir" in last_line(output)
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
  # As where locks do not reach another machine: the lock names the other one.
  (workdir / "checkpoints" / "lock").write_text("process 7 on elsewhere since then\n")
  os.kill(pid, signal.SIGCONT)
  assert good.commands.wait() == 1
  line = last_line((good.folder / "two.txt").read_text())
  assert "checkpoints was taken by another run (process 7 on elsewhere since then)" in line
