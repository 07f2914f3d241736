"""A `gcloud` for tests: records its calls, keeps TPUs in a folder, and fails as it is told.

Under $CLOUD: calls.jsonl (each argv), scenario.json (what is to happen, see Cloud),
resources.json (what exists), hosts/NODE-wI (homes of hosts, where `ssh` runs its command for real).
It knows the flags of the real one (tests/golden/gcloud_flags.txt) and refuses others.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["CLOUD"])
FLAGS = pathlib.Path(__file__).parent / "golden" / "gcloud_flags.txt"
CAPACITY = 'There is no more capacity in the zone "us-east5-b";\nyou can try in another zone'
QUOTA = (
  "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 16 in zone us-east5-b"
)
EXISTS = "ALREADY_EXISTS: Requested entity already exists"


class Cloud:
  """scenario: hosts of a node; create: outcomes of the coming requests (ok, waits, capacity, quota,
  exists, lost: the request is carried out, unsent: it is not, and both end with what stands after
  the colon; then always ok); ssh: outcomes of the coming connections (ok, refused); preempt_at: the
  status queries at which the TPUs are taken away; sticky: deletions that do nothing at first."""

  def __init__(self):
    self.scenario = json.loads((CLOUD / "scenario.json").read_text())
    path = CLOUD / "resources.json"
    self.resources = json.loads(path.read_text()) if path.exists() else {}

  def save(self) -> None:
    (CLOUD / "scenario.json").write_text(json.dumps(self.scenario))
    (CLOUD / "resources.json").write_text(json.dumps(self.resources))

  def next(self, name: str, default: str = "ok") -> str:
    coming = self.scenario.get(name, [])
    return coming.pop(0) if coming else default

  def create(self, kind: str, name: str, flags: dict[str, str]) -> None:
    outcome, _, error = self.next("create").partition(": ")
    if outcome == "unsent":
      fail(f"gcloud.compute.tpus.{kind}.create", error)
    if outcome == "exists" or f"{kind}/{name}" in self.resources:
      fail(f"gcloud.compute.tpus.{kind}.create", EXISTS)
    if outcome == "quota" or (outcome == "capacity" and kind == "tpu-vm"):
      fail(f"gcloud.compute.tpus.{kind}.create", QUOTA if outcome == "quota" else CAPACITY)
    if kind == "queued-resources":
      state = {
        "ok": "ACTIVE",
        "lost": "ACTIVE",
        "waits": "WAITING_FOR_RESOURCES",
        "capacity": "FAILED",
      }[outcome]
      count = int(flags.get("--node-count", 1))
      nodes = [flags.get("--node-id") or f"{flags['--node-prefix']}-{i}" for i in range(count)]
      message = CAPACITY if outcome == "capacity" else ""
      self.resources[f"{kind}/{name}"] = {"state": state, "message": message, "nodes": nodes}
    else:
      nodes = [name]
    if outcome in ("ok", "lost"):
      self._start(nodes)
    if outcome == "lost":
      fail(f"gcloud.compute.tpus.{kind}.create", error)

  def _start(self, nodes: list[str]) -> None:
    for node in nodes:
      self.resources[f"tpu-vm/{node}"] = {"state": "READY"}
      for host in self.hosts(node):
        host.mkdir(parents=True)

  def describe(self, kind: str, name: str, flags: dict[str, str]) -> None:
    found = self.resources.get(f"{kind}/{name}")
    if found is None:
      fail(f"gcloud.compute.tpus.{kind}.describe", "NOT_FOUND: Requested entity was not found")
    # With the trailing blank of the real one, where there is no message.
    asks_why = "failedData" in flags["--format"]
    print(f"{found['state']} {found.get('message', '')}" if asks_why else found["state"])
    if found["state"] == "WAITING_FOR_RESOURCES":  # there the next time
      found["state"] = "ACTIVE"
      self._start(found["nodes"])

  def delete(self, kind: str, name: str, flags: dict[str, str]) -> None:
    found = self.resources.get(f"{kind}/{name}")
    if found is None:
      fail(f"gcloud.compute.tpus.{kind}.delete", "NOT_FOUND: Requested entity was not found")
    if self.scenario.get("sticky", 0) > 0:
      self.scenario["sticky"] -= 1
      fail(f"gcloud.compute.tpus.{kind}.delete", "FAILED_PRECONDITION: it is SUSPENDING")
    nodes = [node for node in found.get("nodes", []) if f"tpu-vm/{node}" in self.resources]
    if nodes and "--force" not in flags:
      fail(f"gcloud.compute.tpus.{kind}.delete", "FAILED_PRECONDITION: it has nodes; use --force")
    del self.resources[f"{kind}/{name}"]
    for node in [*nodes, name]:
      self.resources.pop(f"tpu-vm/{node}", None)
      self._end_hosts(node)

  def preempt(self) -> None:
    """As the real one: nodes first, the queued resource with them, and what runs there is gone."""
    for name, found in self.resources.items():
      kind, _, name = name.partition("/")
      found["state"] = "PREEMPTED" if kind == "tpu-vm" else "SUSPENDED"
      if kind == "tpu-vm":
        self._end_hosts(name)

  def _end_hosts(self, node: str) -> None:
    for host in self.hosts(node):
      for pid in host.glob("*/job/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
      shutil.rmtree(host, ignore_errors=True)

  def hosts(self, node: str) -> list[pathlib.Path]:
    return [CLOUD / "hosts" / f"{node}-w{i}" for i in range(self.scenario.get("hosts", 1))]

  def ssh(self, node: str, flags: dict[str, str]) -> list[pathlib.Path]:
    if "on_host.sh status" in flags["--command"]:
      self.scenario["looks"] = self.scenario.get("looks", 0) + 1
      if self.scenario["looks"] in self.scenario.get("preempt_at", []):
        self.preempt()
    self._connect(node)
    return self.hosts(node)

  def scp(self, source: str, destination: str) -> None:
    node, _, path = destination.partition(":")
    self._connect(node)
    for host in self.hosts(node):
      shutil.copy(source, host / path)

  def _connect(self, node: str) -> None:
    state = self.resources.get(f"tpu-vm/{node}", {}).get("state")
    if state != "READY":
      fail("gcloud.compute.tpus.tpu-vm.ssh", f'This TPU has terminal state "{state}"')
    if self.next("ssh") == "refused":
      print("ssh: connect to host 10.0.0.1 port 22: Connection refused", file=sys.stderr)
      sys.exit(255)


def fail(command: str, message: str) -> None:
  print(f"ERROR: ({command}) {message}", file=sys.stderr)
  raise SystemExit(1)


def known_flags(command: str) -> set[str]:
  lines = dict(line.split(":", 1) for line in FLAGS.read_text().splitlines() if line[0] != "#")
  return {*lines[command].split(), *lines["every command"].split()}


def main(arguments: list[str]) -> int | None:
  with (CLOUD / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
  kind, verb = arguments[2:4]
  flags = {
    name: value
    for word in arguments
    for name, _, value in [word.partition("=")]
    if word[:2] == "--"
  }
  unknown = sorted(set(flags) - known_flags(f"compute tpus {kind} {verb}"))
  if unknown or "--zone" not in flags or "--project" not in flags:
    print(f"ERROR: unrecognized arguments or no zone: {unknown} {arguments}", file=sys.stderr)
    return 2
  names = [word for word in arguments[4:] if not word.startswith("--")]
  with (CLOUD / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # nodes are spoken to at the same time
    cloud = Cloud()
    try:
      if verb == "ssh":
        hosts = cloud.ssh(*names, flags)
      elif verb == "scp":
        return cloud.scp(*names)
      else:
        return getattr(cloud, verb)(kind, *names, flags)
    finally:
      cloud.save()
  running = [
    subprocess.Popen(
      ["bash", "-c", flags["--command"]],
      env={**os.environ, "HOME": str(host), "HOST": host.name},
      cwd=host,
    )
    for host in hosts
  ]
  statuses = [process.wait() for process in running]
  return next((status for status in statuses if status), 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
