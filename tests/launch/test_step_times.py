"""How steps are timed (launch/step_times.py)."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from launch import step_times
from models.flops import flops_per_token
from sharding import topology
from tests import tiny
from train import program as programs


@pytest.mark.parametrize(
  ("ahead", "order"), [(0, "d0 w0 d1 w1 d2 w2 d3 w3"), (1, "d0 d1 w0 d2 w1 d3 w2 w3")]
)
def test_a_step_is_dispatched_while_the_one_before_runs(monkeypatch, ahead, order):
  """As in training. When each step was waited for, an H100 was idle for 10 ms of a step of 280."""
  happened = []

  def step():
    number = sum(each.startswith("d") for each in happened)
    happened.append(f"d{number}")
    return number

  def end_of(number):
    happened.append(f"w{number}")
    return float(number)

  monkeypatch.setattr(step_times, "_end_of", end_of)
  assert step_times._ends(step, 4, ahead=ahead) == [0.0, 1.0, 2.0, 3.0]
  assert " ".join(happened) == order


def test_seconds_are_those_from_one_end_to_the_next(tmp_path, monkeypatch):
  program = programs.build(tiny.run(tmp_path), devices=jax.devices()[:1])
  compiled = programs.lower_train_step(program).compile()
  clock = iter([0.0, 5.0, 6.0, 8.0, 11.0])
  monkeypatch.setattr(step_times, "_end_of", lambda metrics: next(clock))
  timed = step_times.run_steps(program, compiled, warmup=2, steps=3)
  assert timed.seconds == [1.0, 2.0, 3.0]
  with pytest.raises(ValueError, match="0 steps before the timed ones must be at least 1"):
    step_times.run_steps(program, compiled, warmup=0, steps=3)


@pytest.mark.parametrize(("platform", "count"), [("cpu", 0), ("gpu", 1), ("tpu", 1)])
def test_only_on_a_cpu_is_each_step_waited_for_before_the_next_is_dispatched(
  platform, count, tmp_path, monkeypatch
):
  device = types.SimpleNamespace(platform=platform, process_index=0)
  mesh = types.SimpleNamespace(devices=np.full((1, 1, 1, 1), device))
  monkeypatch.setattr(programs, "initialize", lambda program: None)
  monkeypatch.setattr(programs, "to_devices", lambda batch, mesh: batch)
  counts = []

  def ends(step, steps, *, ahead):
    counts.append(ahead)
    return [float(index) for index in range(steps) if step()]

  monkeypatch.setattr(step_times, "_ends", ends)
  program = types.SimpleNamespace(run=tiny.run(tmp_path), mesh=mesh)
  step_times.run_steps(program, lambda *_: (None, True), warmup=1, steps=1)
  assert counts == [count]


def test_speed_is_of_the_median_step_and_the_peaks_of_all_chips(tmp_path, monkeypatch):
  run = tiny.run(tmp_path)
  chip = topology.chip_named("v5e")
  monkeypatch.setattr(topology, "chip_of", lambda kind: chip)
  devices = np.full((4,), types.SimpleNamespace(device_kind="TPU v5e"))
  program = types.SimpleNamespace(run=run, mesh=types.SimpleNamespace(devices=devices))
  memory = types.SimpleNamespace(
    argument_size_in_bytes=1,
    temp_size_in_bytes=20,
    generated_code_size_in_bytes=300,
    output_size_in_bytes=9000,
    alias_size_in_bytes=5000,
  )
  compiled = types.SimpleNamespace(memory_analysis=lambda: memory)
  timed = step_times.Steps([1.0, 2.0, 9.0], None, None, types.SimpleNamespace(loss=1.5))
  told = step_times.speed(program, compiled, timed)
  tokens_per_second = run.batch_size * run.data.row_length / 2.0
  assert told["tokens_per_second"] == tokens_per_second
  assert told["step_seconds"] == {"median": 2.0, "min": 1.0, "max": 9.0, "steps": 3}
  flops = flops_per_token(run.model, run.data.row_length).train
  assert told["mfu"] == pytest.approx(flops * tokens_per_second / (4 * chip.peak_flops))
  # What takes the place of an argument is not new.
  assert told["peak_bytes"] == 1 + 20 + 300 + (9000 - 5000)


def test_no_target_of_a_random_row_is_of_another_document(tmp_path):
  run = dataclasses.replace(tiny.run(tmp_path), batch_size=64)
  tokens, targets, segments, weights = step_times._random_batch(run, num_shares=2)
  assert len(tokens) == 32
  np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
  np.testing.assert_array_equal(weights[:, :-1], segments[:, 1:] == segments[:, :-1])
  assert {*weights.flat} == {0.0, 1.0}
