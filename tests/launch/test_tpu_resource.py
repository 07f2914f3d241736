"""Asking for TPUs and giving them back: what is paid for is known, and nothing is left of it."""

import shlex
import subprocess

import pytest

from tests.cluster_checkout import ROOT
from tests.pretended_cloud import JOB, SUCCEEDS

# gcloud's own words, where the request was heard and the answer was not.
LOST = [
  "DEADLINE_EXCEEDED: Deadline expired before operation could complete.",
  "HTTPError 504: Gateway Timeout",
  "gcloud crashed (BrokenPipeError): [Errno 32] Broken pipe",
]


@pytest.mark.parametrize(("mode", "error"), [("queued", LOST[0]), ("vm", LOST[1]), ("vm", LOST[2])])
def test_tpus_whose_request_lost_its_answer_are_used_and_deleted(cloud, mode, error):
  cloud.set(SUCCEEDS, create=[f"lost: {error}"])
  output = cloud.run("up", f"--mode={mode}", *JOB)
  assert "try is ready and asked for no more, in spite of ERROR: " in output
  assert "complete" in output
  assert len([call for call in cloud.calls() if " create " in call]) == 1
  assert not cloud.resources()


def test_a_request_that_was_lost_itself_is_made_again(cloud):
  cloud.set(SUCCEEDS, create=[f"unsent: {LOST[0]}"])
  assert "asking again (try 1 of 50)" in cloud.run("create")
  assert cloud.resources()["tpu-vm/try"]["state"] == "READY"


def test_where_nobody_says_what_became_of_a_request_nothing_is_called_unmade(cloud):
  answers = "[[ $* == *' describe '* && -e $CLOUD/asked ]] && { echo 'ERROR: no' >&2; exit 1; }\n"
  answers += "[[ $* == *' create '* ]] && { touch $CLOUD/asked; echo 'ERROR: no' >&2; exit 1; }\n"
  path = cloud.folder / "bin/gcloud"
  path.write_text(path.read_text().replace("exec", answers + "exec", 1))
  output = cloud.run("create", "--ssh_attempts=2", status=1)
  assert "gcloud does not answer (ERROR: no" in output
  assert "nothing was made" not in output


def bash(text: str, **settings: str) -> str:
  """What functions of tpu_resource.sh print."""
  values = {"dry_run": "false", "mode": "vm", "slices": "1", "name": "try", **settings}
  values = {"ssh_attempts": "3", "poll_seconds": "30", **values}
  script = (
    "set -euo pipefail\nSETTINGS=\nsource launch/settings.sh\nsource launch/tpu_resource.sh\n"
  )
  script += "".join(f"setting[{name}]={value}\n" for name, value in values.items())
  done = subprocess.run(
    ["bash", "-c", script + text], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
  )
  return done.stdout


def test_only_what_waiting_can_help_is_asked_for_again():
  meanings = {
    "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'R' and limit 'R per minute'": "capacity",
    "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' has been exceeded. Limit: 16": "quota",
    "There is no more capacity in the zone": "capacity",
    "INVALID_ARGUMENT: no such type": "refused",
    "PERMISSION_DENIED: 403": "refused",
    "": "capacity",
  }
  said = bash("\n".join(f"classify {shlex.quote(reason)}" for reason in meanings)).splitlines()
  assert [line.partition(":")[0] for line in said] == list(meanings.values())


def test_pauses_grow_up_to_ten_minutes():
  text = "pause_for() { echo $1; }; for try in 1 2 3 30; do pause $try; done"
  assert bash(text, retry_seconds="15").split() == ["15", "30", "60", "600"]


def test_capacity_is_waited_for_so_many_minutes():
  text = """resource_state() { echo waiting:X; }; say() { :; }
    sleep() { SECONDS=$((SECONDS + $1)); echo slept; }
    SECONDS=0; wait_for_hosts /dev/null"""
  said = bash(text, wait_minutes="2").split()
  assert said.count("slept") in (4, 5)  # of 30 s
  assert said[-1] == "late"


def test_a_node_that_outlives_its_queued_resource_is_deleted(cloud):
  cloud.set_resources({"tpu-vm/try": {"state": "READY"}})
  cloud.run("delete")
  assert not cloud.resources()


def test_a_vm_that_failed_late_is_deleted(cloud):
  cloud.set(SUCCEEDS, create=["lost: There is no more capacity in the zone"])
  output = cloud.run("create", "--mode=vm", "--capacity_attempts=1", status=1)
  assert "nothing is left of try" in output
  assert not cloud.resources()


@pytest.mark.parametrize(
  ("queued", "node", "state"),
  [
    ("ACTIVE", "PREEMPTED", "gone:try:PREEMPTED"),  # a node knows before its queue does
    ("ACTIVE", "CREATING", "waiting:try:CREATING"),
    ("SUSPENDING", "READY", "gone:SUSPENDING"),
    ("ACTIVE", "READY", "ready"),
  ],
)
def test_tpus_that_are_being_taken_away_are_gone(queued, node, state):
  describe = f"_describe() {{ [[ $1 == tpu-vm ]] && echo {node} || echo {queued}; }}\n"
  assert bash(f"{describe}resource_state", mode="queued").strip() == state


def test_where_gcloud_does_not_answer_nothing_is_deleted(cloud):
  cloud.run("create")
  (cloud.folder / "scenario.json").write_text("not JSON: gcloud ends badly")
  output = cloud.run("up", "--ssh_attempts=2", *JOB, status=1)
  assert "gcloud does not answer" in output
  assert "nothing was deleted" in output
  assert not [call for call in cloud.calls() if " delete " in call]


def test_flags_of_ones_own_reach_gcloud(cloud):
  own = ("--spot", "--create_flags=--network=n --service-account=s", "--ssh_flags=--internal-ip")
  cloud.run("create", "--mode=vm", *own)
  assert "--spot --network=n --service-account=s --zone" in cloud.calls("tpu-vm create")[0]
  cloud.run("ssh", "--mode=vm", *own, "--", "hostname")
  assert "--command=hostname --internal-ip --zone" in cloud.calls("tpu-vm ssh")[0]
