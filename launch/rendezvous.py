"""The first contact between the processes of a job: each learns all hosts, or which did not come.

When a process is missing, jax's own start names neither its index nor its host, and aborts the
others. This uses the coordinator's port before jax does: process 0 listens, every other process
sends its index and host, and receives the list of all hosts once the last has come.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any

from absl import logging

_SECONDS_BETWEEN_REPORTS = 15.0
_SECONDS_BETWEEN_TRIES = 0.1


class MissingProcessError(RuntimeError):
  """Processes of the job did not come in time, or disagree; the message names them."""


def meet(coordinator: str, *, index: int, count: int, seconds: float) -> tuple[str, ...]:
  """The host of every process, by index, once all `count` are there.

  `coordinator` is host:port of process 0. Raises MissingProcessError on all that came, after
  `seconds`.
  """
  if count == 1:
    return (socket.gethostname(),)
  host, _, port = coordinator.rpartition(":")
  if index == 0:
    with _listener(int(port)) as listener:
      return _gather(listener, count=count, seconds=seconds)
  return _announce((host, int(port)), index=index, count=count, seconds=seconds)


def names(indices: list[int]) -> str:
  """ "process 3" or "processes 1, 2, 3 and 14 more"."""
  shown = ", ".join(map(str, indices[:8]))
  more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
  return f"process{'es' if len(indices) > 1 else ''} {shown}{more}"


def _gather(listener: socket.socket, *, count: int, seconds: float) -> tuple[str, ...]:
  start, last_report = time.monotonic(), time.monotonic()
  hosts = {0: socket.gethostname()}
  problem = ""
  with contextlib.ExitStack() as stack:
    connections = []
    while len(hosts) < count and not problem:
      now = time.monotonic()
      missing = [index for index in range(count) if index not in hosts]
      if now - start > seconds:
        problem = (
          f"waited {now - start:.0f} s for {names(missing)} of {count}{_expected(missing)}. There "
          f"are {_listed(hosts)}"
        )
        break
      if now - last_report > _SECONDS_BETWEEN_REPORTS:
        last_report = now
        logging.warning(
          "waiting for %s of %d for %.0f s so far", names(missing), count, now - start
        )
      listener.settimeout(max(0.01, min(1.0, start + seconds - now)))
      try:
        connection = stack.enter_context(listener.accept()[0])
      except TimeoutError:
        continue
      hello = _receive(connection, seconds=5.0)
      if hello is None or hello.keys() != {"index", "count", "host"}:
        continue  # a port scanner, or a process that died as it came
      connections.append(connection)
      problem = _wrong(hello, hosts, count)
      hosts.setdefault(hello["index"], hello["host"])
    answer = {"error": problem} if problem else {"hosts": [hosts[i] for i in range(count)]}
    for connection in connections:
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b"\n")
  if problem:
    raise MissingProcessError(problem)
  return tuple(answer["hosts"])


def _announce(
  address: tuple[str, int], *, index: int, count: int, seconds: float
) -> tuple[str, ...]:
  start = time.monotonic()
  hello = {"index": index, "count": count, "host": socket.gethostname()}
  reason = "nobody listens"
  while (left := start + seconds - time.monotonic()) > 0:
    try:
      with socket.create_connection(address, timeout=min(left, 10.0)) as connection:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        # Process 0 gives up first, and says who is missing.
        answer = _receive(connection, seconds=left + 10.0)
    except OSError as error:
      reason = str(error)
      time.sleep(_SECONDS_BETWEEN_TRIES)
      continue
    if answer is None:
      reason = "it went away"
      time.sleep(_SECONDS_BETWEEN_TRIES)
      continue
    if "error" in answer:
      raise MissingProcessError(answer["error"])
    return tuple(answer["hosts"])
  raise MissingProcessError(
    f"waited {time.monotonic() - start:.0f} s for process 0, the coordinator, at {address[0]}:"
    f"{address[1]} ({reason}). Is it started, and does a firewall let port {address[1]} through?"
  )


def _listener(port: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
      )
    return socket.create_server(("", port), backlog=1024)
  except OSError as error:
    raise MissingProcessError(
      f"process 0 cannot listen on port {port} ({error}); give --coordinator another port, or end "
      "the process that uses it"
    ) from error


def _receive(connection: socket.socket, *, seconds: float) -> dict[str, Any] | None:
  """One line of JSON; None if the other side leaves or sends something else."""
  connection.settimeout(seconds)
  data = b""
  try:
    while not data.endswith(b"\n"):
      part = connection.recv(65536)
      if not part:
        return None
      data += part
    message = json.loads(data)
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None


def _wrong(hello: dict[str, Any], hosts: dict[int, str], count: int) -> str:
  index, host = hello["index"], hello["host"]
  if hello["count"] != count:
    return (
      f"process {index} (host {host}) was started as one of {hello['count']} processes, process 0 "
      f"(host {hosts[0]}) as one of {count}"
    )
  if index in hosts:
    return f"two processes say that they are process {index}: on host {hosts[index]} and on {host}"
  return ""


def _listed(hosts: dict[int, str]) -> str:
  shown = ", ".join(f"process {i} on host {hosts[i]}" for i in sorted(hosts)[:8])
  return shown + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")


def _expected(missing: list[int]) -> str:
  """The hosts of the missing processes, where the cluster names them."""
  workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
  if len(workers) > max(missing):
    return f" (host {', '.join(workers[index] for index in missing[:8])})"
  if nodes := os.environ.get("SLURM_STEP_NODELIST"):
    return f" (hosts of the job: {nodes})"
  return ""
