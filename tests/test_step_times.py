"""How steps are timed (launch/step_times.py)."""

import jax
import pytest

from launch import step_times
from tests import tiny
from train import program as programs


@pytest.mark.parametrize(
  ("ahead", "order"), [(0, "d0 w0 d1 w1 d2 w2 d3 w3"), (1, "d0 d1 w0 d2 w1 d3 w2 w3")]
)
def test_a_step_is_dispatched_while_the_one_before_runs(monkeypatch, ahead, order):
  """As in training: waited for one by one, an H100 stood still for 10 ms of a step of 280."""
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
