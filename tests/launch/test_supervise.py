"""`launch.supervise` and `launch.local` with commands of milliseconds: when they start again."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import supervise
from launch.local import combined
from launch.supervise import History

ROOT = pathlib.Path(__file__).parents[2]
# Ends with the next of the statuses in the file `statuses`; notes when in `starts`.
COMMAND = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with open(folder / "starts", "a") as file: file.write(f"{time.monotonic()}\\n")
lines = (folder / "statuses").read_text().splitlines()
(folder / "statuses").write_text("\\n".join(lines[1:]))
status, step, error = json.loads(lines[0])
if step is not None: (folder / "checkpoints" / f"{step:08d}").mkdir(parents=True, exist_ok=True)
if error: (folder / "failure.json").write_text(json.dumps({"step": step or 0, "error": error}))
sys.exit(status)
"""


def _supervise(folder, *options, command):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.supervise", f"--workdir={folder}", *options, "--", *command],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )


def _run(folder, attempts, *options):
  """Exit status, output and the pauses before each restart, for attempts (status, step, error)."""
  (folder / "statuses").write_text("\n".join(map(json.dumps, attempts)))
  command = [sys.executable, "-S", "-c", COMMAND, str(folder)]
  process = _supervise(folder, "--backoff_seconds=0.2", *options, command=command)
  output, _ = process.communicate(timeout=60)
  starts = [float(line) for line in (folder / "starts").read_text().split()]
  return process.returncode, output, [b - a for a, b in itertools.pairwise(starts)]


def test_it_starts_again_until_complete_and_pauses_longer_each_time(tmp_path):
  attempts = [(75, 10, None), (76, 10, None), (-9 % 256, 10, "x"), (0, 20, None)]
  status, output, pauses = _run(tmp_path, attempts)
  assert status == 0, output
  assert len(pauses) == 3
  assert pauses[0] < 0.2 + 0.4  # 75 is no fault: at once
  assert pauses[1] >= 0.2 * 2
  assert pauses[2] >= 0.2 * 4


def test_a_failure_that_comes_three_times_at_the_same_step_ends_it(tmp_path):
  status, output, pauses = _run(tmp_path, [(1, 5, "ValueError: no")] * 9, "--backoff_seconds=0.01")
  assert status == 1
  assert len(pauses) == 2
  assert "the same failure 3 times at step 5: ValueError: no" in output


def test_what_cannot_be_run_is_not_started_again(tmp_path):
  status, output, pauses = _run(tmp_path, [(2, None, None)])
  assert (status, pauses) == (2, []), output
  process = _supervise(tmp_path, command=["/nowhere/at/all"])
  assert "/nowhere/at/all" in process.communicate(timeout=60)[0]
  assert process.returncode == 2


def test_what_is_wrong_with_a_workdir_is_told_by_the_command(tmp_path):
  (tmp_path / "file").write_text("")
  process = _supervise(tmp_path / "file", command=["bash", "-c", "echo no folder; exit 2"])
  assert "no folder" in process.communicate(timeout=60)[0]
  assert process.returncode == 2


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--max_restarts=-1", "-1 must be at least 0"),
    ("--max_restarts=many", "invalid int value: 'many'"),
    ("--backoff_seconds=nan", "nan must be at least 0, and finite"),
  ],
)
def test_numbers_that_are_no_count_or_pause_are_refused(monkeypatch, capsys, option, message):
  monkeypatch.setattr(sys, "argv", ["supervise", "--workdir=x", option, "--", "true"])
  with pytest.raises(SystemExit) as left:
    supervise.main()
  assert left.value.code == 2
  assert message in capsys.readouterr().err


def test_restarts_are_counted_since_the_last_progress():
  history = History(max_restarts=2, backoff_seconds=1.0, max_backoff_seconds=3.0)
  assert history.after(1, 10, None) == 1.0
  assert history.after(1, 10, None) == 2.0
  assert history.after(1, 20, None) == 1.0  # further than before: counted anew
  assert history.after(1, 20, None) == 2.0
  assert "2 restarts without a newer checkpoint than step 20" in history.after(1, 20, None)
  longer = History(max_restarts=9, backoff_seconds=1.0, max_backoff_seconds=3.0)
  assert [longer.after(76, -1, None) for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
  assert longer.after(75, -1, None) == 0.0  # all saved: nothing to wait for


def test_other_steps_or_errors_are_other_failures():
  history = History(max_restarts=99, backoff_seconds=0.0, max_backoff_seconds=0.0)
  failures = [(5, "a"), (5, "a"), (6, "a"), (6, "b"), None, (6, "b"), (6, "b")]
  assert all(history.after(1, -1, failure) == 0.0 for failure in failures)
  assert history.after(1, -1, (6, "b")) == "the same failure 3 times at step 6: b"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_is_passed_on_and_then_it_leaves_as_the_command_does(tmp_path, number):
  # A shell that is told to stop, and says that everything is saved.
  script = f"trap 'exit 75' TERM INT; touch {tmp_path}/ready; while :; do sleep 0.05; done"
  process = _supervise(tmp_path, command=["bash", "-c", script])
  end = time.monotonic() + 30
  while not (tmp_path / "ready").exists():
    assert time.monotonic() < end
    time.sleep(0.01)
  os.kill(process.pid, number)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 75
  assert f"{number.name}: the command ended with 75" in output


@pytest.mark.parametrize("count", [1, 2])
def test_who_is_ended_by_the_signal_before_it_can_hear_it_has_all_saved(tmp_path, count):
  script = f"import pathlib, time; pathlib.Path('{tmp_path}/ready').touch(); time.sleep(60)"
  command = [sys.executable, "-S", "-c", script]
  if count > 1:
    command = [sys.executable, "-m", "launch.local", "-n", str(count), "--", *command]
  process = _supervise(tmp_path, command=command)
  end = time.monotonic() + 30
  while not (tmp_path / "ready").exists():
    assert time.monotonic() < end
    time.sleep(0.01)
  os.kill(process.pid, signal.SIGTERM)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 75, output


def test_the_status_of_a_job_is_that_of_the_process_that_says_most():
  assert combined([0, 0]) == 0
  assert combined([75, 75, 0]) == 75
  assert combined([-9, 76]) == 76
  assert combined([0, -9]) == 76
  assert combined([1, 76, 76]) == 1
  assert combined([2, 76]) == 2


def _local(script, count, *, grace_seconds):
  """The files that `count` processes of a Python script write; the last argument has the index."""
  options = ["-n", str(count), f"--grace_seconds={grace_seconds}"]
  return subprocess.run(
    [sys.executable, "-m", "launch.local", *options, "--", sys.executable, "-S", "-c", script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def test_one_process_that_dies_takes_the_others_with_it_in_time():
  # The last argument is the process id: 0 dies, the others would sleep for a minute.
  script = (
    "import sys, time; print('here'); time.sleep(0 if sys.argv[-1][-1] == '0' else 60); 1 / 0"
  )
  start = time.monotonic()
  done = _local(script, 3, grace_seconds=0.3)
  assert time.monotonic() - start < 10
  assert done.returncode == 1
  lines = done.stdout.splitlines()
  assert "[local] process 0 ended with 1" in lines
  assert "[local] process 2 has not left in 0.3 s: killed" in lines
  assert "[0] ZeroDivisionError: division by zero" in lines


def test_who_has_saved_and_left_waits_for_those_who_have_not():
  script = "import sys, time; rank = int(sys.argv[-1][-1]); time.sleep(rank); sys.exit(75)"
  done = _local(script, 2, grace_seconds=0.1)
  assert (done.returncode, done.stdout) == (75, "")


def _local_sh(folder, *arguments):
  """The arguments that launch/local.sh passes to the interpreter, or its status and output."""
  python = folder / "python"
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  done = subprocess.run(
    ["launch/local.sh", *arguments],
    cwd=ROOT,
    env={**os.environ, "PYTHON": str(python)},
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout.split(), done.stderr


def test_local_sh_supervises_processes_that_train(tmp_path):
  train = ["--config=configs/smoke.py", "--workdir=runs/a"]
  supervise = ["-m", "launch.supervise", "--workdir=runs/a"]
  local = ["-m", "launch.local", "--processes=4", "--", str(tmp_path / "python")]
  tail = ["--", str(tmp_path / "python"), *local, "-m", "launch.train", *train]
  assert _local_sh(tmp_path, "-n", "4", "--", *train)[:2] == (0, [*supervise, *tail])
  options = ["--max_restarts=3"]
  assert _local_sh(tmp_path, "-n", "4", "--", *options, "--", *train)[1] == [
    *supervise,
    *options,
    *tail,
  ]
  assert _local_sh(tmp_path, "-n", "4", "--", train[0])[::2] == (
    2,
    "error: --workdir=FOLDER is not given\n",
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("-n", "none", "--"), "error: -n none: how many processes?"),
    (("-n", "0", "--"), "error: -n 0: how many processes?"),
    (("-n",), "error: -n : how many processes?"),
    (("--",), "error: -n is missing"),
    (("-n", "2", "--workdir=runs/a"), "error: --workdir=runs/a: what launch.train gets"),
  ],
)
def test_local_sh_says_what_is_wrong_and_how_it_is_called(tmp_path, arguments, message):
  status, _, told = _local_sh(tmp_path, *arguments)
  assert status == 2
  assert told.startswith(message)
  assert "launch/local.sh -n 4" in told
  assert _local_sh(tmp_path, "--help")[0] == 0
