"""A cloud in a folder, with tpu.sh run against it: tests/recording_gcloud.py is its gcloud."""

import json
import pathlib
import shlex
import sys
import time

from tests.cluster_checkout import ROOT, Script, environment

ENV_FILE = """
# a comment
NAME=try
PROJECT=my-project
ZONE="us-east5-b"
ACCELERATOR_TYPE=v5litepod-16
RUNTIME_VERSION=v2-alpha-tpuv5-lite
BUCKET=my-bucket
RETRY_SECONDS=0
POLL_SECONDS=0.02
"""
SUCCEEDS = 'echo "$HOST $*" >>"$CLOUD/jobs"; echo "step  7/10 | loss 1"; echo "step 10/10 | loss 1"'
RUNS_ON = """
  trap 'echo saved; exit 75' TERM
  echo "$HOST $*" >>"$CLOUD/jobs"; echo "step 3/10"
  while true; do sleep 1 & wait $!; done
"""
JOB = ("--", "--config=configs/griffin.py:1b", "--config.name=a b")


class Cloud(Script):
  """A pretended cloud in a folder, and tpu.sh run against it."""

  def __init__(self, folder: pathlib.Path, checkout: pathlib.Path):
    recorder = shlex.join([sys.executable, "-S", "-E", str(ROOT / "tests/recording_gcloud.py")])
    programs = {"gcloud": f'exec {recorder} "$@"'}
    variables = {**environment(folder, programs), "POLL_SECONDS": "0.02"}
    super().__init__("tpu.sh", folder / "cluster.env", checkout, variables)
    self.env_file.write_text(ENV_FILE)
    self.set(SUCCEEDS)

  def set(self, job: str, **scenario) -> None:
    (self.folder / "job.sh").write_text(job)
    (self.folder / "scenario.json").write_text(json.dumps(scenario))

  def calls(self, *kinds: str) -> list[str]:
    """The recorded commands, without `gcloud compute tpus`; only those that start like `kinds`."""
    path = self.folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [" ".join(json.loads(line)[2:]) for line in lines]
    return [call for call in calls if not kinds or call.startswith(kinds)]

  def resources(self) -> dict[str, dict]:
    path = self.folder / "resources.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def set_resources(self, resources: dict[str, dict]) -> None:
    (self.folder / "resources.json").write_text(json.dumps(resources))

  def lines(self, name: str) -> list[str]:
    path = self.folder / name
    return path.read_text().splitlines() if path.exists() else []


def wait_until(condition) -> None:
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)
