"""The event log: every second of a run is counted once, whatever killed it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from train.telemetry import goodput
from train.telemetry.events import Events
from train.telemetry.goodput import HEARTBEAT, JSONL, KINDS


class _Clock:
  """A clock that only moves when a test moves it."""

  def __init__(self, at: float = 1000.0):
    self.at = at

  def __call__(self) -> float:
    return self.at


def _steps(events, clock, steps, *, seconds=10.0):
  for step in steps:
    clock.at += seconds
    events.finished(step)


def _die(events, folder, clock, *, kind="step"):
  """What is left when a process is killed: no last line, and a heartbeat."""
  events._is_open = False
  events._closing.set()
  events._thread.join()
  events._file.close()
  os.close(events._beat)
  beat = json.dumps({"time": clock.at, "kind": kind})
  (folder / HEARTBEAT).write_text(beat.ljust(95) + "\n")


def _begin(folder, clock, *, resume):
  events = Events(folder, began=clock.at, about={"name": "one"}, clock=clock)
  clock.at += 1  # init
  with events.span("restore"):
    clock.at += 2
  events.resume(resume)
  with events.span("compile"):
    clock.at += 4
  return events


def _killed_twice(folder):
  """Two kills, each with steps that are done again, and a run that ends."""
  clock = _Clock()
  events = _begin(folder, clock, resume=0)
  with events.span("step"):
    _steps(events, clock, range(1, 5))
    with events.span("checkpoint"):
      clock.at += 3
    _steps(events, clock, range(5, 8))
    with events.span("evaluation", step=7):
      clock.at += 8
    clock.at += 6  # killed in step 8
    _die(events, folder, clock)
    clock.at += 100
    events = _begin(folder, clock, resume=4)
    clock.at += 0.5
    _die(events, folder, clock, kind="init")
    clock.at += 50
    events = _begin(folder, clock, resume=4)
  with events, events.span("step"):
    with events.waiting():
      clock.at += 5
    _steps(events, clock, range(5, 9))
    share = events.goodput()
    events.end("complete")
  return clock, share


def test_every_second_is_counted_once_and_lost_steps_are_lost(tmp_path):
  clock, share = _killed_twice(tmp_path)
  log = goodput.read(tmp_path)
  seconds = log.seconds()
  assert seconds == pytest.approx(
    {
      "init": 3 * 1 + 0.5,
      "compile": 3 * 4,
      "restore": 3 * 2,
      "step": 4 * 10 + 4 * 10,
      "data_wait": 5,
      "checkpoint": 3,
      "evaluation": 0,
      "lost": 3 * 10 + 8 + 6,
      "idle": 150,
    },
    abs=0.01,
  )
  assert set(seconds) == set(KINDS)
  assert sum(seconds.values()) == pytest.approx(clock.at - 1000.0, abs=0.01)
  assert share == pytest.approx(80 / (clock.at - 1000.0), abs=1e-3)
  assert [start.step for start in log.starts] == [0, 4, 4]
  assert log.starts[0].about["name"] == "one"
  assert log.outcome == "complete"
  for before, after in zip(log.pieces, log.pieces[1:]):
    assert before.end == after.start


def test_the_log_of_a_run_that_was_cut_anywhere_still_adds_up(tmp_path):
  _killed_twice(tmp_path)
  whole = (tmp_path / JSONL).read_bytes()
  (tmp_path / HEARTBEAT).unlink()
  for cut in range(0, len(whole), 7):
    (tmp_path / JSONL).write_bytes(whole[:cut])
    log = goodput.read(tmp_path)
    span = log.pieces[-1].end - log.pieces[0].start if log.pieces else 0.0
    assert sum(log.seconds().values()) == pytest.approx(span, abs=0.01)
    assert all(piece.end >= piece.start for piece in log.pieces)


def test_a_torn_last_line_does_not_spoil_the_next(tmp_path):
  _killed_twice(tmp_path)
  starts = len(goodput.read(tmp_path).starts)
  with (tmp_path / JSONL).open("a") as file:
    # Nor does what another program has written.
    file.write('{"time": "Friday", "kind": "start"}\n{"time": null, "kind": "end"}\n{"time": 17')
  with Events(tmp_path, began=5000.0, about={}, clock=_Clock(5000.0)) as events:
    events.resume(8)
  assert len(goodput.read(tmp_path).starts) == starts + 1


def test_a_clock_that_was_set_back_between_two_starts_costs_no_time(tmp_path):
  clock = _Clock(90000.0)
  events = _begin(tmp_path, clock, resume=0)
  with events.span("step"):
    _steps(events, clock, range(1, 5))
    _die(events, tmp_path, clock)
  before = goodput.read(tmp_path).seconds()
  clock.at = 3600.0
  with _begin(tmp_path, clock, resume=4) as events, events.span("step"):
    _steps(events, clock, range(5, 9))
    share = events.goodput()
    events.end("complete")
  seconds = goodput.read(tmp_path).seconds()
  assert seconds["step"] - before["step"] == pytest.approx(40, abs=0.01)
  assert share == pytest.approx(seconds["step"] / sum(seconds.values()), abs=1e-3)


def test_a_full_disk_does_not_hide_the_error_that_ends_a_run(tmp_path):
  clock = _Clock()

  def end_on_a_full_disk():
    with _begin(tmp_path, clock, resume=0) as events, open("/dev/full", "wb") as full:
      os.dup2(full.fileno(), events._file.fileno())
      clock.at += 10
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    end_on_a_full_disk()


def test_only_the_steps_of_a_line_that_are_done_again_are_lost(tmp_path):
  lines = [
    {"time": 0.0, "kind": "start"},
    {"time": 40.0, "kind": "step", "steps": [1, 4], "data_wait": 8.0},
    {"time": 50.0, "kind": "start"},
    {"time": 50.0, "kind": "resume", "step": 1},
  ]
  (tmp_path / JSONL).write_text("".join(json.dumps(line) + "\n" for line in lines))
  seconds = goodput.read(tmp_path).seconds()
  found = {kind: time for kind, time in seconds.items() if time}
  assert found == {"step": 8, "data_wait": 2, "lost": 30, "idle": 10}


def test_going_back_without_a_restart_loses_the_steps_after(tmp_path):
  clock = _Clock()
  with _begin(tmp_path, clock, resume=0) as events, events.span("step"):
    _steps(events, clock, range(1, 5))
    events.resume(3)
    _steps(events, clock, range(4, 6))
  log = goodput.read(tmp_path)
  assert [start.step for start in log.starts] == [0]
  assert (log.seconds()["step"], log.seconds()["lost"]) == pytest.approx((50, 10))


def test_a_start_that_finds_the_run_complete_is_not_part_of_it(tmp_path):
  clock, _ = _killed_twice(tmp_path)
  before = goodput.read(tmp_path)
  for outcome in ("complete", "ValueError"):
    clock.at += 1e5
    with Events(tmp_path, began=clock.at, about={}, clock=clock) as events:
      clock.at += 3
      events.end(outcome)
    after = goodput.read(tmp_path)
    assert after.seconds() == before.seconds()
    assert (after.outcome, after.starts) == ("complete", before.starts)
  # Nor is the time before the run is made longer and goes on.
  clock.at += 1e5
  with Events(tmp_path, began=clock.at, about={}, clock=clock) as events:
    clock.at += 3
    events.resume(8)
    events.end("stopped")
  seconds = goodput.read(tmp_path).seconds()
  assert seconds["idle"] == pytest.approx(before.seconds()["idle"], abs=0.01)
  assert seconds["init"] == pytest.approx(before.seconds()["init"] + 3, abs=0.01)


_PROCESS = """
import sys, time
from train.telemetry.events import Events, now, process_start
with Events(sys.argv[1], began=process_start(), about={}) as events:
  events.resume(0)
  with events.span("compile"):
    print("compiling", flush=True)
    time.sleep(60)
"""


def test_killed_while_it_compiles_that_time_is_compilation(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", _PROCESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "compiling\n"
  while goodput.read(tmp_path).seconds()["compile"] < 1.0:
    assert process.poll() is None
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  process.stdout.close()
  log = goodput.read(tmp_path)
  assert log.outcome is None
  assert log.tail["kind"] == "compile"
  # Importing jax took a while before the log was opened: it is counted too.
  assert log.seconds()["init"] > 0.2
  with Events(tmp_path, began=log.end + 2.0, about={}) as events:
    events.resume(0)
  after = goodput.read(tmp_path)
  assert after.seconds()["compile"] == pytest.approx(log.seconds()["compile"])
  assert after.seconds()["idle"] == pytest.approx(2.0, abs=0.01)
