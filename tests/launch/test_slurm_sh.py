"""launch/slurm.sh and its batch script, with a Slurm that records its calls."""

import pathlib
import shlex
import signal
import subprocess
import time

import pytest

from tests.cluster_checkout import Script, environment, git, golden_flags

# Each records its words; two fail at those of their calls whose numbers are in a file. A job in the
# queue is the file `queue`, with its state; a scancel takes it out, unless there is a file
# `preempts`.
RECORD = 'printf "%s\\n" "$(basename "$0") $*" >>"$CLOUD/calls"'
FAILS = """
  asked=$(grep -c "^$(basename "$0") " "$CLOUD/calls")
  if grep -qsx "$asked" "$CLOUD/$(basename "$0")_fails"; then
    echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1
  fi
"""
PROGRAMS = {
  "sbatch": f'{RECORD}; echo RUNNING >"$CLOUD/queue"; echo 17',
  "squeue": f'{RECORD}\n{FAILS}[ -e "$CLOUD/queue" ] || exit 0\n'
  'case $* in *%T*) cat "$CLOUD/queue" ;; *) echo 17 ;; esac',
  "scancel": f"""{RECORD}
    [ -e "$CLOUD/pids" ] && kill -TERM $(cat "$CLOUD/pids")
    [ -e "$CLOUD/preempts" ] || rm -f "$CLOUD/queue"
  """,
  "scontrol": f"{RECORD}\n{FAILS}",
  # Two hosts, whose tasks end one after the other, and its status is the highest of theirs.
  "srun": f"""{RECORD}
    while [[ $1 == -* ]]; do shift; done
    for host in 0 1; do
      SLURM_PROCID=$host "$@" >>"$CLOUD/output" 2>&1 & echo $! >>"$CLOUD/pids"
    done
    status=0
    for pid in $(cat "$CLOUD/pids"); do
      one=0; wait $pid || one=$?
      ((one > status)) && status=$one
    done
    exit $status
  """,
}
ENV_FILE = "NAME=try\nNODES=2\nGPUS_PER_NODE=8\nTIME=1-00:00:00\nPOLL_SECONDS=0.02\n"
JOB = ("--", "--config=configs/griffin.py:1b", "--config.name=a b")
SAVES = """
  trap 'sleep 0.0$SLURM_PROCID; echo "saved $SLURM_PROCID"; exit 75' TERM
  echo "started $SLURM_PROCID $JAX_LOCAL_DEVICE_IDS"
  while true; do sleep 1 & wait $!; done
"""


class Slurm(Script):
  """A pretended cluster in a folder, and slurm.sh run against it."""

  def __init__(self, folder: pathlib.Path, checkout: pathlib.Path):
    variables = {**environment(folder, PROGRAMS), "HOST": "login"}
    super().__init__("slurm.sh", folder / "slurm.env", checkout, variables)
    self.shared = folder / "shared"
    self.env_file.write_text(f"{ENV_FILE}FOLDER={self.shared}\n")

  def calls(self, program: str) -> list[str]:
    lines = self.lines("calls")
    return [line for line in lines if line.split()[0] == program]

  def fail(self, program: str, *calls: int) -> None:
    """Lets these calls of the program fail, counted from 1."""
    (self.folder / f"{program}_fails").write_text("".join(f"{call}\n" for call in calls))

  def lines(self, name: str) -> list[str]:
    path = self.folder / name
    return path.read_text().splitlines() if path.exists() else []

  def batch(self, job: str, **variables: str) -> subprocess.Popen:
    """The batch script as Slurm starts it, with this as the job."""
    (self.folder / "job.sh").write_text(job)
    (self.folder / "queue").write_text("RUNNING\n")
    self.shared.mkdir(exist_ok=True)
    slurm = {
      "RETRY_SECONDS": "0",
      "SLURM_JOB_ID": "17",
      "SLURM_JOB_NUM_NODES": "2",
      "SLURM_JOB_NODELIST": "n[1-2]",
    }
    script = self.checkout / "launch/slurm_job.sh"
    words = [str(self.shared), str(self.checkout), "bash", str(self.folder / "job.sh"), "a b"]
    return subprocess.Popen(
      ["bash", str(script), *words],
      env={**self.environment, **slurm, **variables},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )


@pytest.fixture
def slurm(tmp_path, checkout):
  return Slurm(tmp_path, checkout)


def test_submit_queues_exactly_the_commit_once(slurm):
  assert "job 17" in slurm.run("submit", *JOB)
  commit = git(slurm.checkout, "rev-parse", "HEAD")
  code = slurm.shared / f"code-{commit[:12]}"
  assert (code / "CODE_VERSION").read_text() == f"{commit}\n"
  for name in git(slurm.checkout, "ls-files").splitlines():
    assert (code / name).read_bytes() == (slurm.checkout / name).read_bytes()
  assert slurm.lines("made") == ["login EXTRA=cuda PYTHON=" + made_with(slurm)]
  workdir = slurm.shared / "workdir"
  assert slurm.calls("sbatch") == [
    f"sbatch --parsable --job-name=try --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 "
    f"--time=1-00:00:00 --requeue --signal=B:TERM@900 --open-mode=append "
    f"--output={slurm.shared}/logs/batch.out "
    f"--export=ALL,CONTAINER=none,IMAGE=,STOP_SECONDS=900,MAX_REQUEUES=100 "
    f"{code}/launch/slurm_job.sh {slurm.shared} {code} .venv/bin/python -m launch.supervise "
    f"--max_restarts=20 --backoff_seconds=10 --workdir={workdir} -- .venv/bin/python "
    f"-m launch.train --workdir={workdir} --config=configs/griffin.py:1b --config.name=a b"
  ]
  assert "is queued or running already: job 17" in slurm.run("submit", *JOB)
  assert len(slurm.calls("sbatch")) == 1


def made_with(slurm: Slurm) -> str:
  return f"{slurm.folder / 'bin/python3.11'} .venv/ready-cuda"


def test_nobody_is_asked_of_jobs_that_are_not_ones_own(slurm):
  (slurm.folder / "preempts").touch()
  signalled(slurm)
  assert slurm.calls("squeue") == ["squeue --noheader --jobs=17 --format=%T"]
  (slurm.folder / "preempts").unlink()
  for words in (("submit", *JOB), ("status",), ("stop",)):
    slurm.run(*words)
  assert len(slurm.calls("squeue")) >= 5
  for call in slurm.calls("squeue"):
    assert "--jobs=17 " in call or " --me --name=try " in call


def test_code_whose_environment_was_not_finished_is_put_there_again(slurm):
  slurm.run("submit", *JOB)
  (slurm.folder / "queue").unlink()
  (code,) = slurm.shared.glob("code-*")
  (code / ".venv/complete").unlink()
  (code / "pyproject.toml").unlink()
  slurm.run("submit", *JOB)
  assert (code / "pyproject.toml").exists()
  assert (code / ".venv/complete").exists()


def test_a_second_submit_of_a_commit_uses_what_is_there(slurm):
  slurm.run("submit", *JOB)
  (slurm.folder / "queue").unlink()
  inode = next(slurm.shared.glob("code-*")).stat().st_ino
  (slurm.shared / "stop").touch()
  slurm.run("submit", *JOB)
  assert next(slurm.shared.glob("code-*")).stat().st_ino == inode
  assert not (slurm.shared / "stop").exists()
  assert len(list(slurm.shared.glob("environment-cuda-*"))) == 1


def test_a_checkout_with_changes_is_refused_or_shipped_as_a_patch(slurm, tmp_path):
  checkout = tmp_path / "changed"
  git(slurm.checkout, "clone", "--quiet", slurm.checkout, checkout)
  slurm.checkout = checkout
  (checkout / "new.txt").write_text("new\n")
  assert "--allow_dirty" in slurm.run("submit", *JOB, status=1)
  assert "NOT A COMMIT" in slurm.run("submit", "--allow_dirty", *JOB)
  (code,) = slurm.shared.glob("code-*+*")
  assert (code / "new.txt").read_text() == "new\n"
  assert "new.txt" in (code / "uncommitted.patch").read_text()


def test_a_dry_run_prints_every_command_and_runs_none(slurm):
  output = slurm.run("submit", "--dry_run", *JOB)
  assert not slurm.lines("calls")
  assert not slurm.shared.exists()
  words = [shlex.split(line) for line in output.splitlines() if line.startswith("sbatch ")]
  assert words[0][-1] == "--config.name=a b"


def test_the_flags_are_slurms(slurm):
  """sbatch and srun of Slurm 22.05.8 and pyxis have them all."""
  slurm.run("submit", "--container=pyxis", "--image=some/image", "--account=a", *JOB)
  slurm.batch("exit 0", CONTAINER="pyxis", IMAGE="some/image", SLURM_GPUS_ON_NODE="4").communicate()
  slurm.run("status")
  known = golden_flags("slurm_flags.txt")
  for line in slurm.lines("calls"):
    program, *words = line.split()
    ours = [word for word in words if word.startswith("--")]
    if program in ("sbatch", "srun"):  # then come the words of the job
      first = next(index for index, word in enumerate(words) if not word.startswith("--"))
      ours = words[:first]
    if program != "scontrol":
      assert {word.split("=")[0] for word in ours} <= known[program], line


def test_one_task_on_each_host_gets_all_its_gpus(slurm):
  job = 'echo "$SLURM_PROCID of $JAX_LOCAL_DEVICE_IDS in $PWD: $*"'
  process = slurm.batch(job, SLURM_GPUS_ON_NODE="8")
  assert "the job ended with status 0" in process.communicate(timeout=30)[0]
  assert process.returncode == 0
  assert sorted(slurm.lines("output")) == [
    f"{host} of 0,1,2,3,4,5,6,7 in {slurm.checkout}: a b" for host in range(2)
  ]
  (srun,) = slurm.calls("srun")
  assert "--nodes=2 --ntasks-per-node=1" in srun
  assert f"--output={slurm.shared}/logs/%N.log --open-mode=append" in srun
  assert not slurm.calls("scontrol")


@pytest.mark.parametrize(
  ("container", "words"),
  [
    (
      "pyxis",
      "--container-image=some/image --container-mounts={0}:{0} --container-workdir={1} bash",
    ),
    ("apptainer", "apptainer exec --nv --bind {0} --pwd {1} some/image bash"),
  ],
)
def test_the_job_runs_in_a_container(slurm, container, words):
  (slurm.folder / "bin/apptainer").write_text('#!/bin/bash\nexec "${@:8}"\n')
  (slurm.folder / "bin/apptainer").chmod(0o755)
  process = slurm.batch("exit 0", CONTAINER=container, IMAGE="some/image")
  process.communicate(timeout=30)
  assert process.returncode == 0
  assert words.format(slurm.shared, slurm.checkout) in slurm.calls("srun")[0]
  slurm.folder.joinpath("queue").unlink()
  slurm.run("submit", f"--container={container}", "--image=some/image", *JOB)
  assert " python3 -m launch.supervise " in slurm.calls("sbatch")[0]
  assert not slurm.lines("made")


def signalled(slurm: Slurm, **variables: str) -> tuple[str, int]:
  """Output and status of a batch script that Slurm sends SIGTERM to, before the time limit."""
  process = slurm.batch(SAVES, **variables)
  deadline = time.monotonic() + 20
  while len(slurm.lines("output")) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  return process.communicate(timeout=30)[0], process.returncode


def test_before_the_time_limit_all_hosts_save_and_the_job_is_queued_again(slurm):
  (slurm.folder / "preempts").touch()
  output, status = signalled(slurm)
  assert status == 75
  assert "queued again" in output
  assert slurm.calls("scancel") == ["scancel --signal=TERM 17.0"]
  assert sorted(slurm.lines("output"))[:2] == ["saved 0", "saved 1"]
  # The first host that has saved does not end the second.
  (srun,) = slurm.calls("srun")
  assert "--kill-on-bad-exit=0 --wait=900" in srun
  assert slurm.calls("scontrol") == ["scontrol requeue 17"]


def test_a_job_that_was_cancelled_or_stopped_or_requeued_too_often_is_not_queued_again(slurm):
  signalled(slurm)  # scancel takes it out of the queue
  for name in ("pids", "output"):
    (slurm.folder / name).unlink()
  (slurm.folder / "preempts").touch()
  signalled(slurm, SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
  for name in ("pids", "output"):
    (slurm.folder / name).unlink()
  (slurm.shared / "stop").touch()
  assert signalled(slurm)[1] == 75
  assert not slurm.calls("scontrol")


def test_a_saved_job_is_queued_again_though_slurm_is_too_busy_to_answer_at_once(slurm):
  (slurm.folder / "preempts").touch()
  slurm.fail("squeue", 1, 2)
  slurm.fail("scontrol", 1)
  output, status = signalled(slurm)
  assert "squeue failed; asking again (try 2 of 12)" in output
  assert "scontrol failed; asking again (try 1 of 12)" in output
  assert slurm.calls("scontrol") == ["scontrol requeue 17"] * 2
  assert status == 75


def test_a_saved_job_that_nobody_knows_of_is_not_queued_again_and_that_is_said(slurm):
  (slurm.folder / "preempts").touch()
  slurm.fail("squeue", *range(1, 99))
  output, status = signalled(slurm)
  assert "NOT queued again" in output
  assert status == 75
  assert len(slurm.calls("squeue")) == 12
  assert not slurm.calls("scontrol")


def test_a_failure_ends_the_job_with_its_status(slurm):
  process = slurm.batch("[ $SLURM_PROCID = 1 ] && exit 3; exit 0")
  process.communicate(timeout=30)
  assert process.returncode == 3
  assert not slurm.calls("scontrol")


def test_stop_lets_it_save_and_takes_what_waits_out_of_the_queue(slurm):
  slurm.run("submit", *JOB)
  assert "not in the queue" in slurm.run("stop")
  assert (slurm.shared / "stop").exists()
  (slurm.folder / "queue").write_text("PENDING\n")
  slurm.run("stop")
  assert slurm.calls("scancel") == ["scancel --signal=TERM 17.0", "scancel 17"]
  (slurm.folder / "bin/scancel").write_text("#!/bin/bash\n")
  (slurm.folder / "queue").write_text("RUNNING\n")
  assert "still runs" in slurm.run("stop", "--stop_seconds=0", status=1)


def test_stop_takes_no_silence_for_an_end(slurm):
  slurm.run("submit", *JOB)
  (slurm.folder / "preempts").touch()
  # Of stop's calls the first two find the job; then it is waited for.
  first = len(slurm.calls("squeue")) + 1
  slurm.fail("squeue", *range(first + 2, 99))
  output = slurm.run("stop", "--stop_seconds=0", status=1)
  assert "squeue does not answer" in output
  assert "job 17 still runs" in output
  # Where its state is not known it is not cancelled: without a signal first it would not save.
  slurm.fail("squeue", len(slurm.calls("squeue")) + 2)
  assert "does not say whether job 17 runs" in slurm.run("stop", status=1)
  assert slurm.calls("scancel") == ["scancel --signal=TERM 17.0"]
  (slurm.folder / "preempts").unlink()
  slurm.fail("squeue", *range(len(slurm.calls("squeue")) + 3, len(slurm.calls("squeue")) + 5))
  assert "is not in the queue" in slurm.run("stop")


def test_status_and_logs_name_the_host(slurm):
  (slurm.shared / "logs").mkdir(parents=True)
  (slurm.shared / "logs/n1.log").write_text("step  9/20 | loss 2\nstep 10/20 | loss 1\n")
  (slurm.shared / "logs/n2.log").write_text("waiting\n")
  assert "n1 step 10/20" in slurm.run("status")
  assert sorted(slurm.run("logs", "--lines=1").splitlines()) == [
    "n1 | step 10/20 | loss 1",
    "n2 | waiting",
  ]


def test_logs_that_are_followed_go_on(slurm):
  log = slurm.shared / "logs/n1.log"
  log.parent.mkdir(parents=True)
  log.write_text("step 1/20\n")
  command = slurm.command("logs", "--follow")
  with subprocess.Popen(command, env=slurm.environment, stdout=-1, text=True) as process:
    try:
      assert process.stdout.readline() == "n1 | step 1/20\n"
      with log.open("a") as file:
        file.write("step 2/20\n")
      assert process.stdout.readline() == "n1 | step 2/20\n"
    finally:
      process.terminate()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("submit", "--folder=relative", *JOB), "not an absolute path"),
    (("submit", "--workdir=runs/x", *JOB), "neither an absolute path nor a URL"),
    (("submit", "--container=docker", *JOB), "none of none, pyxis, apptainer"),
    (("submit", "--image=x", *JOB), "--image needs --container"),
    (("submit", "--nodes=0", *JOB), "--nodes=0 is below 1"),
    (("submit", "--backoff_seconds=x", *JOB), "--backoff_seconds=x is not a number of seconds"),
    (("submit",), "put the arguments of launch.train after --"),
    (("cancel",), "no command cancel"),
  ],
)
def test_a_wrong_command_line_gets_a_reason(slurm, words, message):
  assert message in slurm.run(*words, status=2)
  assert not slurm.lines("calls")


def test_each_missing_value_is_one_line(slurm):
  output = slurm.run("submit", "--container=pyxis", *JOB, status=2)
  assert output.count(" is missing") == 1
  assert "--image" in output
