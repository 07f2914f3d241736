"""How steps are timed (launch/step_times.py)."""

import jax
import jax.numpy as jnp
import pytest

from launch import step_times
from tests import tiny
from train import program as programs


def test_a_step_is_dispatched_while_the_one_before_runs(tmp_path, monkeypatch):
  """As in training: waited for one by one, an H100 stood still for 10 ms of a step of 280."""
  program = programs.build(tiny.run(tmp_path), devices=jax.devices()[:1])
  happened, clock = [], iter([0.0, 5.0, 6.0, 8.0, 11.0])

  def compiled(state, batch, limits):
    happened.append("dispatched")
    return state, jnp.zeros(())

  def end_of(metrics):
    happened.append("over")
    return next(clock)

  monkeypatch.setattr(step_times, "_end_of", end_of)
  timed = step_times.run_steps(program, compiled, warmup=2, steps=3)
  assert happened == ["dispatched", *(["dispatched", "over"] * 4), "over"]
  # From the end of the last step before them.
  assert timed.seconds == [1.0, 2.0, 3.0]
  with pytest.raises(ValueError, match="0 steps before the timed ones must be at least 1"):
    step_times.run_steps(program, compiled, warmup=0, steps=3)
