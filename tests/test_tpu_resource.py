"""Asking for TPUs and giving them back: what is paid for is known, and nothing is left of it."""

import pytest

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
