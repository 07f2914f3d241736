"""Several processes of `python -m launch.train` do what one does, and recover from every fault."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import tiny
from tests.commands import ROOT
from tests.tolerances import assert_close
from train.checkpoint.storage import steps
from train.job import agreement
from train.job.signals import SECONDS_OF_ONE_REQUEST
from train.workdir.jsonl import read_jsonl

# One worker for all of them: they share the runs of the fixtures.
pytestmark = pytest.mark.xdist_group("processes")

NUM_KILLS = 20
SEED = 4
# A process that is silent for so many seconds is gone.
PATIENCE = 3.0
LOST = 76


def losses(workdir):
  """The loss of each step; a step that a restart did again must give the same bits."""
  found = {}
  for record in read_jsonl(workdir / "metrics.jsonl"):
    if "train/loss" in record:
      values = (record["train/loss"], record["train/targets"])
      assert found.setdefault(record["step"], values) == values
  return found


def assert_same_run(actual, expected):
  """The same batches, and the same losses except for the order of sums."""
  assert actual.keys() == expected.keys()
  for step, (loss, targets) in expected.items():
    assert actual[step][1] == targets
    assert_close(actual[step][0], loss, dtype="float32", reduction=1024)


def wait_for(condition, seconds=90.0):
  end = time.monotonic() + seconds
  while not (result := condition()):
    assert time.monotonic() < end, "nothing happened"
    time.sleep(0.01)
  return result


class Job:
  """N processes of one command, each with its output in a file."""

  def __init__(
    self, jobs, name, count, *changes, module="launch.train", first=(), second=None, tree=None
  ):
    """`first` are arguments before all others, `second` those of process 1 in place of the common
    ones, `tree` the folder of its sources in place of this one.

    With `second` the processes find each other as those of a Slurm job do, else by flags.
    """
    with socket.socket() as listener:
      listener.bind(("127.0.0.1", 0))
      port = listener.getsockname()[1]
    slurm = {"SLURM_JOB_ID": str(port), "SLURM_NTASKS": str(count)}
    slurm |= {"SLURM_STEP_NODELIST": "localhost,other", "SLURM_STEP_NUM_NODES": str(count)}
    self.commands, self.workdir = jobs.commands, jobs.folder / name
    self.outputs = [jobs.folder / f"{name}-{index}.txt" for index in range(count)]
    changes = [*changes, f"--heartbeat_seconds={PATIENCE}"]
    self.pids = [
      jobs.commands.start(
        "tests.changed_train" if tree and index == 1 else module,
        [
          *([str(tree)] if tree and index == 1 else first),
          *(second if second and index == 1 else jobs.arguments(name)),
          *changes,
          *([] if second else [f"--coordinator=127.0.0.1:{port}"]),
          *([] if second else [f"--num_processes={count}", f"--process_id={index}"]),
        ],
        output,
        **({**slurm, "SLURM_PROCID": str(index), "SLURM_LOCALID": "0"} if second else {}),
      )
      for index, output in enumerate(self.outputs)
    ]

  def at_step(self, step):
    """Waits until the run has reached this step."""
    wait_for(lambda: max(losses(self.workdir), default=0) >= step)
    return self

  def statuses(self):
    return [self.commands.wait(pid) for pid in self.pids]

  def text(self, index):
    return self.outputs[index].read_text()

  def tail(self):
    return "\n".join("\n".join(output.read_text().splitlines()[-15:]) for output in self.outputs)


class Jobs:
  """What all jobs of these tests share."""

  def __init__(self, commands, folder):
    self.commands, self.folder = commands, folder

  def arguments(self, name):
    return [
      f"--config=tests/tiny_config.py:{self.folder}",
      f"--workdir={self.folder / name}",
      "--config.checkpoint.every_steps=10",
    ]

  def disturbed(self, name, count=2, *changes, what="steps"):
    """A job of 20 steps a second, slow enough to interfere with it, or with `what` it does."""
    changes = changes or ["--config.mesh.fsdp=2"]
    return Job(self, name, count, *changes, module="tests.slow_train", first=[what])


@pytest.fixture(scope="module")
def jobs(commands, tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  tiny.run(folder)
  return Jobs(commands, folder)


@pytest.fixture(scope="module")
def straight(jobs):
  """The losses of one undisturbed process, and those of two."""
  one = jobs.commands.run("launch.train", jobs.arguments("one"), jobs.folder / "one.txt")
  assert one[0] == 0, one[1]
  job = Job(jobs, "two", 2, "--config.mesh.fsdp=2")
  assert job.statuses() == [0, 0], job.tail()
  two = losses(job.workdir)
  assert sorted(two) == list(range(1, 61))
  return losses(jobs.folder / "one"), two


def test_two_processes_train_as_one(straight):
  one, two = straight
  assert_same_run(two, one)


def test_told_to_stop_all_save_at_one_step_and_any_number_goes_on(jobs, straight):
  # Two processes, of which one gets the signal; then four, which split rows and widths and all get
  # Ctrl-C; then one.
  job = jobs.disturbed("elastic").at_step(12)
  os.kill(job.pids[1], signal.SIGTERM)
  assert job.statuses() == [75, 75], job.tail()
  assert "SIGTERM on process 1 (host " in job.text(0)
  first = max(steps(job.workdir / "checkpoints"))
  assert 12 <= max(losses(job.workdir)) == first < 60

  mesh = ["--config.mesh.sequence=2", "--config.mesh.tensor=2"]
  job = jobs.disturbed("elastic", 4, *mesh).at_step(first + 5)
  assert f"restored step {first}" in job.text(0)
  for pid in job.pids:
    os.kill(pid, signal.SIGINT)
  assert job.statuses() == [75] * 4, job.tail()
  second = max(steps(job.workdir / "checkpoints"))
  assert first + 5 <= max(losses(job.workdir)) == second < 60

  output = jobs.folder / "elastic.txt"
  status, text = jobs.commands.run("launch.train", jobs.arguments("elastic"), output)
  assert status == 0, text
  assert f"restored step {second}" in text
  assert_same_run(losses(job.workdir), straight[0])


@pytest.mark.parametrize("who", [1, 0], ids=["worker", "coordinator"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_one_gone_or_hanging_is_named_and_the_other_leaves_in_time(jobs, straight, who, number):
  name = f"{number.name}{who}"
  job = jobs.disturbed(name)
  wait_for(lambda: steps(job.workdir / "checkpoints"))
  os.kill(job.pids[who], number)
  start = time.monotonic()
  assert jobs.commands.wait(job.pids[1 - who]) == LOST, job.tail()
  seconds = time.monotonic() - start
  if number == signal.SIGSTOP:
    os.kill(job.pids[who], signal.SIGKILL)
  assert jobs.commands.wait(job.pids[who]) == -signal.SIGKILL
  named = f"process {who} (host {socket.gethostname()})"
  assert re.search(rf"{re.escape(named)}.*(gone|not answered)", job.text(1 - who)), job.tail()
  # A silent process is noticed after the time set; a broken connection after a roll call.
  assert seconds < PATIENCE + 4.0
  if number == signal.SIGSTOP:
    return
  # Fewer or more of them go on: the same batches, and the same losses but for the order of sums.
  saved = max(steps(job.workdir / "checkpoints"))
  count = 1 if who else 4
  job = Job(jobs, name, count, f"--config.mesh.fsdp={count}")
  assert job.statuses() == [0] * count, job.tail()
  assert f"restored step {saved} from" in job.text(0)
  assert_same_run(losses(job.workdir), straight[0])


@pytest.mark.parametrize("what", ["compile", "evaluate", "save", "data"])
def test_told_to_stop_in_the_midst_of_something_all_leave_with_all_saved(jobs, what):
  more = [f"--config.data.eval_source={jobs.folder}/eval", "--config.eval_every=5"]
  job = jobs.disturbed(f"in-{what}", 2, "--config.mesh.fsdp=2", *more, what=what)
  who = 0 if what == "save" else 1  # process 0 finishes what all have written
  wait_for(lambda: f"in {what}" in job.text(who))
  os.kill(job.pids[1], signal.SIGTERM)
  start = time.monotonic()
  assert job.statuses() == [75, 75], job.tail()
  assert time.monotonic() - start < 7.0
  told = losses(job.workdir)
  if what in ("compile", "data"):
    assert not told
    assert "SIGTERM on process 1 (host" in job.text(0)
    assert "before the first step: there is nothing to save" in job.text(0)
  else:
    assert max(told) == max(steps(job.workdir / "checkpoints")) < 60


def test_told_twice_a_process_ends_at_once_and_is_missed(jobs, straight):
  job = jobs.disturbed("twice").at_step(3)
  os.kill(job.pids[0], signal.SIGSTOP)  # it does not agree, so the first signal has no end
  os.kill(job.pids[1], signal.SIGTERM)
  wait_for(lambda: "SIGTERM: saving" in job.text(1))
  time.sleep(SECONDS_OF_ONE_REQUEST)
  os.kill(job.pids[1], signal.SIGTERM)
  assert jobs.commands.wait(job.pids[1], seconds=2.0) == 128 + signal.SIGTERM
  os.kill(job.pids[0], signal.SIGCONT)
  assert jobs.commands.wait(job.pids[0]) == LOST
  assert "process 1 (host" in job.text(0)


def test_no_progress_writes_every_stack_and_ends_all(jobs, straight):
  changes = ["--config.mesh.fsdp=2", "--config.watchdog.step_minutes=0.03"]
  job = jobs.disturbed("hangs", 2, *changes, what="hang=8")
  assert job.statuses() == [LOST, LOST], job.tail()
  stacks = (job.workdir / "stacks-1.txt").read_text()
  assert "no progress" in stacks
  assert "in to_devices" in stacks
  assert "in _talk" in stacks  # every thread
  failure = json.loads((job.workdir / "failure.json").read_text())
  assert failure == {"step": 7, "error": "no progress after step 6"}


def test_processes_that_differ_are_refused_by_name(jobs, straight):
  other = jobs.folder / "other"
  tiny.store(other / "train", seed=7)
  second = [f"--config=tests/tiny_config.py:{other}", *jobs.arguments("differ")[1:]]
  second += ["--config.optimizer.peak_lr=0.5"]
  job = Job(jobs, "differ", 2, "--config.mesh.fsdp=2", second=second)
  assert job.statuses() == [1, 1], job.tail()
  for index in range(2):
    assert "process 1 (host" in job.text(index)
    assert "optimizer.peak_lr is 0.5, not 0.01" in job.text(index)
    assert "data.sources[0].fingerprint is" in job.text(index)


def test_a_source_file_that_differs_is_refused_by_name(jobs, tmp_path):
  for folder in agreement._FOLDERS:
    shutil.copytree(ROOT / folder, tmp_path / folder)
  with (tmp_path / "models" / "griffin.py").open("a") as file:
    file.write("# changed by hand\n")
  (tmp_path / "train" / "step.py").rename(tmp_path / "train" / "steps.py")
  job = Job(jobs, "tree", 2, "--config.mesh.fsdp=2", tree=tmp_path)
  assert job.statuses() == [1, 1], job.tail()
  for index in range(2):
    line = next(line for line in job.text(index).splitlines() if "not all processes run" in line)
    assert "the same as process 0 (host" in line
    named = [f"file {name} differs" for name in ("models/griffin.py", "train/step.py")]
    assert f"process 1 (host {socket.gethostname()}): {', '.join(named)}, file train/steps" in line
  assert not steps(job.workdir / "checkpoints")


def test_a_missing_process_is_named_with_the_time_waited(jobs):
  job = Job(jobs, "missing", 2, "--start_seconds=1")
  os.kill(job.pids[1], signal.SIGKILL)
  assert job.statuses() == [LOST, -signal.SIGKILL]
  assert re.search(r"waited 1 s for process 1 of 2\. There are process 0 on host", job.text(0))


def test_killed_at_random_moments_it_comes_back_to_the_undisturbed_losses(jobs, straight):
  name, moments, gained = "killed", random.Random(SEED), 0
  workdir, output = jobs.folder / name, jobs.folder / f"{name}.txt"
  train = [
    *jobs.arguments(name),
    "--config.mesh.fsdp=2",
    "--config.checkpoint.every_steps=2",  # always in a save
    "--config.checkpoint.keep_permanent=2",
    f"--heartbeat_seconds={PATIENCE}",
  ]
  python = [sys.executable, "-m"]
  with output.open("wb") as file:
    supervisor = subprocess.Popen(
      [
        *[*python, "launch.supervise", f"--workdir={workdir}", "--backoff_seconds=0.01", "--"],
        *[*python, "launch.local", "-n", "2", "--grace_seconds=0.1", "--"],
        *[*python, "tests.command", jobs.commands.socket, "launch.train", *train],
      ],
      cwd=ROOT,
      stdout=file,
      stderr=file,
    )

  def newest():
    return max(steps(workdir / "checkpoints"), default=0)

  def started(number):
    """The process ids of the start with this number, once both exist."""
    attempts = output.read_text().split("[supervise]")
    found = re.findall(r"^\[(\d)\] pid (\d+)$", attempts[-1], re.MULTILINE)
    return dict(found) if len(attempts) == number + 1 and len(found) == 2 else None

  def trains():
    return "| loss" in output.read_text().rpartition("[supervise]")[2]

  for kill in range(NUM_KILLS):
    pids = wait_for(lambda kill=kill: started(kill))
    before = newest()
    if kill % 5 in (1, 2, 4) or before > 40:
      time.sleep(moments.uniform(0.0, 1.5))  # while they start, compile and restore
    else:
      wait_for(trains)
      time.sleep(moments.uniform(0.0, 0.6))  # in a step, in a save, between two
    if kill % 5 == 0:
      wait_for(lambda before=before: newest() > before)
    assert newest() < 60, "the run was too fast to be killed"
    os.kill(int(pids[str(kill % 2)]), signal.SIGKILL)
    gained += newest() > before
  assert supervisor.wait(timeout=60) == 0, output.read_text()[-3000:]
  assert gained >= NUM_KILLS // 5
  assert output.read_text().count("SIGKILL") >= NUM_KILLS
  assert losses(workdir) == straight[1]
