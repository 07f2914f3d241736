"""launch/tpu.sh against a gcloud that records, runs commands on pretended hosts, and fails."""

import json
import os
import re
import shlex
import signal
import subprocess

import pytest

from tests.cluster_checkout import ROOT, git
from tests.pretended_cloud import JOB, RUNS_ON, SUCCEEDS, wait_until

TRAIN = (
  "-m launch.supervise --max_restarts=100 --backoff_seconds=10 --workdir=gs://my-bucket/try "
  "-- .venv/bin/python -m launch.train --workdir=gs://my-bucket/try "
  "--config=configs/griffin.py:1b --config.name=a b"
)


def test_up_trains_on_every_host_and_leaves_nothing(cloud):
  cloud.set(SUCCEEDS, hosts=2, create=["waits"])
  output = cloud.run("up", "--spot", "--slices=2", *JOB)
  assert "complete: gs://my-bucket/try" in output
  assert "step 10/10" in output
  hosts = [f"try-{slice_}-w{host}" for slice_ in range(2) for host in range(2)]
  assert sorted(cloud.lines("jobs")) == [f"{host} {TRAIN}" for host in hosts]
  assert sorted(line.split()[0] for line in cloud.lines("made")) == hosts
  assert cloud.calls("queued-resources create") == [
    "queued-resources create try --accelerator-type=v5litepod-16 "
    "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=try --spot "
    "--zone=us-east5-b --project=my-project --quiet"
  ]
  assert len(cloud.calls("queued-resources delete try --force")) == 1
  assert not cloud.resources()
  assert not list((cloud.folder / "tmp").iterdir())


def test_hosts_get_exactly_the_commit(cloud):
  cloud.run("create")
  cloud.run("setup")
  code = cloud.folder / "hosts/try-w0/try/code"
  commit = git(cloud.checkout, "rev-parse", "HEAD")
  assert (code / "CODE_VERSION").read_text() == f"{commit}\n"
  names = git(cloud.checkout, "ls-files").splitlines()
  for name in names:
    assert (code / name).read_bytes() == (cloud.checkout / name).read_bytes()
  assert not (code / "uncommitted.patch").exists()
  made = cloud.lines("made")
  (code / "runs/some").mkdir()
  cloud.run("setup")
  assert (code / "runs/some").is_dir()
  assert cloud.lines("made") == made * 2
  assert (code / ".venv/complete").exists()


def test_a_checkout_with_changes_is_refused_or_shipped_as_a_patch(cloud, tmp_path):
  checkout = tmp_path / "changed"
  git(cloud.checkout, "clone", "--quiet", cloud.checkout, checkout)
  cloud.checkout = checkout
  (checkout / "new.txt").write_text("new\n")
  (checkout / "pyproject.toml").write_text("changed\n")
  output = cloud.run("up", *JOB, status=1)
  assert "?? new.txt" in output
  assert "--allow_dirty" in output
  assert not cloud.calls()
  cloud.run("create")
  assert "NOT A COMMIT" in cloud.run("setup", "--allow-dirty")
  code = cloud.folder / "hosts/try-w0/try/code"
  assert (code / "new.txt").read_text() == "new\n"
  assert (code / "pyproject.toml").read_text() == "changed\n"
  git(checkout, "stash", "--include-untracked", "--quiet")
  git(checkout, "apply", code / "uncommitted.patch")
  assert (checkout / "new.txt").exists()
  assert (checkout / "pyproject.toml").read_text() == "changed\n"
  assert (code / "CODE_VERSION").read_text().startswith(git(checkout, "rev-parse", "HEAD") + "+")


def test_a_dry_run_prints_commands_that_can_be_pasted_and_runs_none(cloud):
  output = cloud.run("up", "--dry-run", "--mode=vm", *JOB)
  assert not cloud.calls()
  assert not list((cloud.folder / "tmp").iterdir())
  commands = [shlex.split(line) for line in output.splitlines() if line.startswith("gcloud ")]
  verbs = [" ".join(words[4:5]) for words in commands]
  assert [verb for verb in verbs if verb != "describe"] == [
    *("create", "scp", "ssh", "ssh", "ssh", "delete")
  ]
  run = next(words for words in commands if "launch.train" in " ".join(words))
  remote = next(word for word in run if word.startswith("--command="))
  assert shlex.split(remote)[-1] == "--config.name=a b"


def test_a_running_job_is_not_started_twice_and_stop_lets_it_save(cloud):
  cloud.set(RUNS_ON, hosts=2)
  cloud.run("create")
  cloud.run("setup")
  assert cloud.run("run", *JOB).count(": started") == 2
  assert cloud.run("run", *JOB).count("running already") == 2
  assert cloud.run("setup").count("set up already") == 2
  wait_until(lambda: cloud.run("status").count(" running step 3/10") == 2)
  assert len(cloud.lines("jobs")) == 2
  assert cloud.run("stop").count(" exited:75 step 3/10") == 2
  output = cloud.run("logs", "--lines=3")
  assert "try try-w0 | saved" in output
  assert "try try-w1 | saved" in output
  assert cloud.run("run", *JOB).count(": started") == 2
  cloud.run("delete")
  assert not cloud.resources()
  assert "absent" in cloud.run("status")


def test_a_host_that_is_not_set_up_says_so_and_what_to_do(cloud):
  cloud.run("create")
  for _ in range(2):
    assert "try-w0 bare (not set up: tpu.sh setup first)" in cloud.run("status")
    assert "try-w0: not set up: tpu.sh setup first" in cloud.run("run", *JOB, status=3)
    # Code without its environment, as an interrupted set-up leaves it, is no more than none.
    cloud.run("setup")
    (cloud.folder / "hosts/try-w0/try/code/.venv/complete").unlink()


def test_stop_says_when_the_job_does_not_end(cloud):
  cloud.set("trap '' TERM; while true; do sleep 0.02; done")
  for command in ("create", "setup"):
    cloud.run(command)
  cloud.run("run", *JOB)
  assert "still runs 0 s after SIGTERM" in cloud.run("stop", "--stop_seconds=0", status=3)
  cloud.run("delete")


def test_logs_follow_every_host_until_interrupted(cloud):
  cloud.set(RUNS_ON, hosts=2)
  for words in (("create",), ("setup",), ("run", *JOB)):
    cloud.run(*words)
  with subprocess.Popen(
    cloud.command("logs", "--follow"),
    env=cloud.environment,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      seen = set()
      while len(seen) < 2:
        line = process.stdout.readline()
        if "step 3/10" in line:
          seen.add(line.split(" | ")[0])
      os.killpg(process.pid, signal.SIGINT)
      process.wait(timeout=10)
    finally:
      process.kill()
  assert seen == {"try try-w0", "try try-w1"}
  cloud.run("delete")


def test_up_asks_again_after_a_preemption(cloud):
  """The job ends well only on the second TPUs: the first are taken away while it runs."""
  cloud.set(f'[ -e "$CLOUD/jobs" ] || {{ {RUNS_ON} }}\n{SUCCEEDS}', preempt_at=[2])
  output = cloud.run("up", *JOB)
  assert "taken away" in output
  assert "complete" in output
  verbs = [call.split()[1] for call in cloud.calls("queued-resources")]
  assert [verb for verb in verbs if verb != "describe"] == ["create", "delete", "create", "delete"]
  assert len(cloud.lines("jobs")) == 2
  assert not cloud.resources()


def test_up_gives_up_after_too_many_preemptions(cloud):
  cloud.set(RUNS_ON, preempt_at=list(range(1, 9)))
  output = cloud.run("up", "--max_recreations=1", *JOB, status=1)
  assert "taken away 2 times" in output
  assert len(cloud.calls("queued-resources create")) == 2
  assert not cloud.resources()


@pytest.mark.parametrize("mode", ["queued", "vm"])
def test_no_capacity_is_asked_for_again(cloud, mode):
  cloud.set(SUCCEEDS, create=["capacity", "capacity"])
  output = cloud.run("create", f"--mode={mode}")
  assert output.count("no more capacity") == 2
  kind = "tpu-vm" if mode == "vm" else "queued-resources"
  assert len(cloud.calls(f"{kind} create")) == 3
  if mode == "queued":  # a failed request stays in the queue until it is deleted
    assert len(cloud.calls(f"{kind} delete")) == 2
  assert cloud.resources()["tpu-vm/try"]["state"] == "READY"


@pytest.mark.parametrize("mode", ["queued", "vm"])
def test_asking_for_capacity_ends_and_leaves_no_request(cloud, mode):
  cloud.set(SUCCEEDS, create=["capacity"] * 9)
  output = cloud.run("up", f"--mode={mode}", "--capacity_attempts=2", *JOB, status=1)
  assert "no TPUs after 2 requests" in output
  assert not cloud.resources()


def test_a_queue_without_end_is_left(cloud):
  cloud.set(SUCCEEDS, create=["waits"])
  assert "within 0 minutes" in cloud.run("create", "--wait_minutes=0", status=1)
  assert not cloud.resources()


@pytest.mark.parametrize("mode", ["queued", "vm"])
def test_quota_is_told_at_once(cloud, mode):
  cloud.set(SUCCEEDS, create=["quota"])
  output = cloud.run("up", f"--mode={mode}", *JOB, status=1)
  told = [line for line in output.splitlines() if line.startswith("tpu.sh:")]
  assert len(told) == 1
  assert "Limit: 16" in told[0]
  assert "Ask for more quota" in told[0]
  assert len([call for call in cloud.calls() if " create " in call]) == 1
  assert not cloud.resources()


def test_what_is_not_ours_is_not_deleted(cloud):
  cloud.set(SUCCEEDS, create=["exists"])
  assert "ALREADY_EXISTS" in cloud.run("up", *JOB, status=1)
  assert not [call for call in cloud.calls() if " delete " in call]


def test_status_fails_where_gcloud_does(cloud):
  (cloud.folder / "scenario.json").write_text("not JSON: gcloud ends badly")
  assert "try unknown:" in cloud.run("status", status=1)


def test_a_suspended_resource_is_deleted_before_another_is_asked_for(cloud):
  cloud.set(SUCCEEDS)
  cloud.run("create")
  cloud.set_resources({"queued-resources/try": {"state": "SUSPENDED", "nodes": []}})
  cloud.run("up", *JOB)
  verbs = [call.split()[1] for call in cloud.calls("queued-resources")]
  assert [verb for verb in verbs if verb != "describe"] == [
    *("create", "delete", "create", "delete")
  ]
  assert not cloud.resources()


def test_a_deletion_that_fails_is_tried_again_and_told_at_the_end(cloud):
  cloud.run("create")
  scenario = json.loads((cloud.folder / "scenario.json").read_text())
  (cloud.folder / "scenario.json").write_text(json.dumps({**scenario, "sticky": 2}))
  assert "is SUSPENDING" in cloud.run("delete")
  assert not cloud.resources()
  cloud.run("create")
  (cloud.folder / "scenario.json").write_text(json.dumps({"sticky": 99}))
  assert "NOT DELETED" in cloud.run("delete", "--ssh_attempts=2", status=1)


def test_a_refused_connection_is_tried_again_with_a_limit(cloud):
  cloud.set(SUCCEEDS, ssh=["refused", "refused"])
  assert "Connection refused" in cloud.run("up", *JOB)
  cloud.set(SUCCEEDS, ssh=["refused"] * 99)
  output = cloud.run("up", "--ssh_attempts=2", *JOB, status=1)
  assert "could not be set up" in output
  assert len(cloud.calls("tpu-vm scp")) >= 3
  assert not cloud.resources()


def test_a_job_that_fails_is_shown_and_not_paid_for_any_longer(cloud):
  cloud.set("echo 'step 2/10'; echo 'the reason'; exit 1")
  output = cloud.run("up", *JOB, status=1)
  assert "try try-w0 | the reason" in output
  assert "gave up" in output
  assert not cloud.resources()


@pytest.mark.parametrize(("job", "status"), [(SUCCEEDS, 0), ("exit 1", 1)], ids=["well", "badly"])
def test_keep_leaves_the_tpus_however_the_job_ends(cloud, job, status):
  cloud.set(job)
  output = cloud.run("up", "--keep", *JOB, status=status)
  assert "costs money" in output
  assert "queued-resources/try" in cloud.resources()


@pytest.mark.parametrize(
  ("states", "judgement"),
  [
    ("running running", "running"),
    ("running exited:0", "running"),  # one is done before the other
    ("running lost", "again"),
    ("running bare", "again"),
    ("exited:0 exited:75", "again"),
    ("exited:0 lost", "again"),
    ("running exited:1", "failed"),
    ("exited:0 exited:0", "complete"),
    ("", "again"),
  ],
)
def test_a_job_is_complete_on_all_hosts_failed_on_one_and_else_goes_on(states, judgement):
  text = (ROOT / "launch/tpu.sh").read_text()
  judge = re.search(r"^judge\(\) \{.*?^\}", text, re.M | re.S)[0]
  lines = "".join(f"host-{index} {state}\n" for index, state in enumerate(states.split()))
  said = subprocess.run(
    ["bash", "-c", f"{judge}\njudge"], input=lines, capture_output=True, text=True, check=True
  )
  assert said.stdout == f"{judgement}\n"


def test_a_job_that_never_completes_is_given_up(cloud):
  cloud.set("exit 75")
  assert "started 2 times and never complete" in cloud.run("up", "--max_restarts=1", *JOB, status=1)
  assert not cloud.resources()


def test_one_look_without_an_answer_is_no_end(cloud):
  cloud.set(SUCCEEDS, ssh=["ok", "ok", "ok", "refused"])
  assert "complete" in cloud.run("up", "--ssh_attempts=1", *JOB)


def test_a_stopped_or_lost_job_is_started_again(cloud):
  """Exit status 75 means saved, start me again; a killed supervisor leaves no status at all."""
  job = f"""
    echo x >>"$CLOUD/tries"
    case $(wc -l <"$CLOUD/tries") in 1) exit 75 ;; 2) kill -9 $PPID; exit 1 ;; esac
    {SUCCEEDS}
  """
  cloud.set(job)
  assert "complete" in cloud.run("up", *JOB)
  assert len(cloud.lines("tries")) == 3


def test_an_interrupted_up_leaves_the_job_and_can_go_on(cloud):
  cloud.set(f'[ -e "$CLOUD/go" ] && {{ {SUCCEEDS}; exit 0; }}\n{RUNS_ON}')
  with subprocess.Popen(
    cloud.command("up", *JOB), env=cloud.environment, stderr=subprocess.PIPE, text=True
  ) as process:
    wait_until(lambda: cloud.folder.joinpath("jobs").exists())
    process.send_signal(signal.SIGTERM)
    assert "left as they are" in process.communicate(timeout=30)[1]
  assert "running" in cloud.run("status")
  cloud.folder.joinpath("go").touch()
  cloud.run("stop")
  assert "complete" in cloud.run("up", *JOB)
  assert not cloud.resources()
  assert len(cloud.calls("queued-resources create")) == 1


def test_ssh_runs_on_one_host_or_on_all(cloud):
  cloud.set(SUCCEEDS, hosts=2)
  cloud.run("create", "--slices=2")
  output = cloud.run("ssh", "--slices=2", "--", "hostname")
  assert sorted(output.split()) == ["try-0-w0", "try-0-w1", "try-1-w0", "try-1-w1"]
  line = cloud.run("ssh", "--slices=2", "--node=1", "--worker=1", "--dry-run")
  assert line.startswith("gcloud compute tpus tpu-vm ssh try-1 --worker=1 --zone=")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("up", "--nmae=x"), "there is no flag --nmae"),
    (("up", "--zone"), "--zone needs a value"),
    (("up", "--spot=perhaps"), "neither true nor false"),
    (("up", "--slices=two"), "not a whole number"),
    (("up", "--slices=00"), "--slices=0 is below 1"),
    (("up", "--poll_seconds=1m"), "--poll_seconds=1m is not a number of seconds"),
    (("ssh", "--node=2", "--slices=02"), "--node=2: slices are numbered from 0, and --slices=2"),
    (("up", "--slices=2", "--mode=vm"), "several slices need --mode=queued"),
    (("up", "--name=Big_One"), "small letters"),
    (("up",), "put the arguments of launch.train after --"),
    (("up", "--bucket=", *JOB), "say where checkpoints go"),
    (("up", "--workdir=here", *JOB), "neither a URL"),
    (("launch",), "no command launch"),
  ],
)
def test_a_wrong_command_line_gets_a_reason_and_the_usage(cloud, words, message):
  output = cloud.run(*words, status=2)
  assert message in output
  assert "--accelerator_type=" in output
  assert not cloud.calls()


def test_each_missing_value_is_one_line(cloud):
  output = cloud.run("create", "--zone=", "--accelerator_type=", status=2)
  assert [line.split(" is missing")[0] for line in output.splitlines()] == [
    *("tpu.sh: --zone", "tpu.sh: --accelerator_type")
  ]
  (cloud.folder / "cluster.env").write_text("NAMEE=x\n")
  assert "cluster.env:1: there is no setting NAMEE" in cloud.run("create", status=1)
