"""`launch.rendezvous`: processes (here threads) learn each other's hosts, or who is missing."""

import concurrent.futures
import socket

import pytest

from launch import rendezvous
from launch.rendezvous import MissingProcessError

HOST = socket.gethostname()


def _meet(calls, *, seconds=1.0):
  """The result or the error of each of the processes (index, count)."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{listener.getsockname()[1]}"

  def call(index, count):
    try:
      return rendezvous.meet(coordinator, index=index, count=count, seconds=seconds)
    except MissingProcessError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(lambda arguments: call(*arguments), calls))


def test_all_learn_the_hosts_of_all_whoever_comes_first():
  assert _meet([(2, 3), (1, 3), (0, 3)], seconds=30.0) == [(HOST,) * 3] * 3
  assert _meet([(0, 1)]) == [(HOST,)]


def test_all_that_came_are_told_who_is_missing(monkeypatch):
  expected = f"waited 1 s for processes 1, 3 of 4. There are process 0 on host {HOST}, process 2 on"
  told = _meet([(0, 4), (2, 4)])
  assert told[0] == told[1]
  assert told[0].startswith(expected)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
  assert "processes 1, 3 of 4 (host b, d)" in _meet([(0, 4), (2, 4)])[0]


def test_a_missing_coordinator_is_named():
  assert "waited 1 s for process 0, the coordinator, at 127.0.0.1:" in _meet([(1, 2)])[0]


@pytest.mark.parametrize(
  ("calls", "expected"),
  [
    ([(0, 3), (1, 3), (1, 3)], "two processes say that they are process 1"),
    ([(0, 2), (1, 3)], f"process 1 (host {HOST}) was started as one of 3 processes, process 0"),
  ],
  ids=["twice", "count"],
)
def test_processes_that_do_not_fit_together_are_all_told(calls, expected):
  told = _meet(calls, seconds=30.0)
  assert all(expected in message for message in told[:2]), told


def test_what_is_no_process_of_the_job_does_no_harm():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(rendezvous.meet, f"127.0.0.1:{port}", index=0, count=2, seconds=30.0)
    for noise in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n", b"{}\n", b""):
      for _ in range(1000):
        try:
          with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
            connection.sendall(noise)
          break
        except ConnectionRefusedError:
          pass
    second = rendezvous.meet(f"127.0.0.1:{port}", index=1, count=2, seconds=30.0)
    assert first.result() == second == (HOST, HOST)
