"""launch/on_host.sh as a host runs it: which code, which environment, what became of the job."""

import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from tests.cluster_checkout import environment
from tests.pretended_cloud import wait_until


class Host:
  """A host with code that is unpacked, and not yet set up."""

  def __init__(self, folder: pathlib.Path, checkout: pathlib.Path):
    self.folder, self.checkout = folder, checkout
    self.home = folder / "try"
    self.environment = {**environment(folder, {}), "HOME": str(folder), "HOST": "host"}
    self.unpack("first")

  def unpack(self, version: str) -> pathlib.Path:
    code = self.home / "code.new"
    shutil.copytree(self.checkout, code, ignore=shutil.ignore_patterns(".git"))
    (code / "CODE_VERSION").write_text(f"{version}\n")
    return code

  def run(self, command: str, *words: str, status: int = 0) -> str:
    script = self.checkout / "launch/on_host.sh"
    done = subprocess.run(
      ["bash", str(script), command, "try", *words],
      env=self.environment,
      capture_output=True,
      text=True,
      timeout=30,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr

  def kill(self) -> None:
    """The job and its supervisor, as where the host is restarted."""
    pid = self.home / "job/pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


@pytest.fixture
def host(tmp_path, checkout):
  return Host(tmp_path, checkout)


def test_other_code_is_not_set_up_under_a_running_job(host):
  host.run("setup")
  host.run("run", "sleep", "60")
  host.unpack("second")
  assert "stop it before other code is set up" in host.run("setup", status=3)
  assert (host.home / "code/CODE_VERSION").read_text() == "first\n"
  host.kill()
  wait_until(lambda: "lost" in host.run("status"))
  host.run("setup")
  assert (host.home / "code/CODE_VERSION").read_text() == "second\n"


def test_the_end_of_an_earlier_job_is_not_that_of_a_later_one(host):
  host.run("setup")
  host.run("run", "true")
  wait_until(lambda: host.run("status") == "host exited:0 \n")
  host.run("run", "sleep", "60")
  host.kill()
  wait_until(lambda: host.run("status") == "host lost \n")


def test_code_of_one_lock_shares_an_environment_and_other_code_does_not(host):
  host.run("setup")
  for changed, count in (("launch/local.sh", 1), ("requirements.lock", 2), ("pyproject.toml", 3)):
    (host.unpack("another") / changed).write_text("another\n")
    host.run("setup")
    assert len(list(host.home.glob("environment-tpu-*"))) == count
