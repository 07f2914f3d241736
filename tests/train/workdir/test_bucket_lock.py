"""One run at a time writes in a bucket, and a run ends only if it lost its lock."""

import os
import socket
import subprocess
import threading
import time

import pytest

from data import bucket
from tests.fake_gcs import serving
from train.workdir import bucket_lock
from train.workdir.bucket_lock import BucketLock
from train.workdir.lock import InUseError

PLACE = "gs://bucket/run/checkpoints"
LOCK = f"{PLACE}/lock"
ANOTHER = b"process 1 on elsewhere, lock 1a2b3c4d"


@pytest.fixture(scope="module")
def server():
  with serving() as server:
    yield server


@pytest.fixture(autouse=True)
def _empty_and_fast(server, monkeypatch):
  server.refuse = server.lose = None
  server.objects.clear()
  monkeypatch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 0.1)


@pytest.fixture
def exits(monkeypatch):
  """The statuses with which locks ended this process; only the thread that renews one stops."""
  statuses = []

  def leave(status):
    statuses.append(status)
    threading.Event().wait()

  monkeypatch.setattr(os, "_exit", leave)
  return statuses


def _lock() -> BucketLock:
  return BucketLock(PLACE)


def _wait_until(condition) -> None:
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def _is_renewed_after(generation: bytes) -> bool:
  return bucket.generation(LOCK) != generation


def test_a_run_whose_lock_was_taken_ends(exits):
  _lock()
  bucket.write(LOCK, ANOTHER)
  _wait_until(lambda: exits == [1])
  assert bucket.read(LOCK) == ANOTHER


def test_a_renewal_that_is_refused_is_tried_again(server, exits):
  lock = _lock()
  server.refuse = "checkpoints/lock"
  time.sleep(0.3)
  server.refuse = None
  before = bucket.generation(LOCK)
  _wait_until(lambda: exits or _is_renewed_after(before))
  assert not exits
  lock.close()
  assert not server.names()


def test_a_renewal_whose_answer_was_lost_is_this_runs_own(server, exits):
  lock = _lock()
  server.lose = "checkpoints/lock"
  _wait_until(lambda: server.lose is None)
  before = bucket.generation(LOCK)
  _wait_until(lambda: exits or _is_renewed_after(before))
  assert not exits
  lock.check()
  lock.close()
  assert not server.names()


def test_a_lock_is_taken_though_the_answer_was_lost(server):
  server.lose = "checkpoints/lock"
  lock = _lock()
  assert server.lose is None
  lock.check()
  lock.close()
  assert not server.names()


def test_a_lock_that_another_has_is_found_out_before_a_save_and_left_there(monkeypatch):
  monkeypatch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 100)
  lock = _lock()
  lock.check()
  bucket.write(LOCK, ANOTHER)
  with pytest.raises(InUseError, match=r"taken by another run \(process 1 on elsewhere.*workdir"):
    lock.check()
  lock.close()
  assert bucket.read(LOCK) == ANOTHER


def test_of_two_locks_of_one_process_each_knows_its_own(monkeypatch):
  """Two hosts may have one name, and processes with the same number."""
  lock = _lock()
  monkeypatch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 0.3)
  with pytest.raises(InUseError, match="in use by a run"):
    _lock()
  lock.check()
  lock.close()


def test_a_holder_is_known_to_be_dead_only_on_its_own_host():
  here = socket.gethostname()
  gone = subprocess.Popen(["true"])
  gone.wait()
  assert bucket_lock._is_dead(f"process {gone.pid} on {here}, lock 1a2b3c4d")
  assert bucket_lock._is_dead(f"process {gone.pid} on {here}")
  for alive in (f"process {os.getpid()} on {here}, lock 1", f"process {gone.pid} on elsewhere", ""):
    assert not bucket_lock._is_dead(alive)
