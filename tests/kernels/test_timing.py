"""How the kernels' `measure` modules time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import timing


def test_one_program_runs_something_several_times_and_gives_its_results():
  seen = []

  def run(x, y):
    jax.debug.callback(lambda value: seen.append(float(value)), y[0])
    return x + y[0], jnp.sin(x).astype(jnp.bfloat16)

  arguments = (jnp.arange(6.0).reshape(2, 3), jnp.full((1,), 2.0))
  program = timing.in_turn(run, arguments, 5)
  assert program.times == 5
  _, results = program.program()
  jax.effects_barrier()
  assert seen == [2.0] * 5
  for got, wanted in zip(results, run(*arguments), strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_a_time_of_several_in_turn_is_that_of_one(monkeypatch):
  """Programs with a clock that they move themselves."""
  now = [0.0]

  def takes(seconds):
    def call():
      now[0] += seconds
      return jnp.zeros(())

    return call

  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
  once, several = timing.Compiled(takes(0.125)), timing.Compiled(takes(2.5), 20)
  seconds = timing.medians({"once": once, "several": several})
  assert seconds == pytest.approx({"once": 0.125, "several": 0.125})


def test_forward_and_backward_has_the_results_too():
  """Otherwise the parts of the forward pass that backward does not need would be left out."""
  x = jnp.linspace(-1.0, 1.0, 8)
  programs, found = timing.two_passes({"sine": lambda x: (jnp.sin(x),)}, (x,), (jnp.ones(8),))
  (y,), (dx,) = programs["sine", "forward_backward"].program()
  np.testing.assert_allclose(y, np.sin(x), rtol=1e-6)
  np.testing.assert_allclose(dx, np.cos(x), rtol=1e-6)
  assert found["sine"]["compile_seconds"] > 0


def test_a_result_that_is_there_twice_is_given_out_once():
  """A loop would copy it: 0.065 of the 0.136 ms measured for a convolution on an H100."""

  def twice(x):
    y = jnp.sin(x)
    return y, y

  x, ones = jnp.linspace(-1.0, 1.0, 8), jnp.ones(8)
  programs, _ = timing.two_passes({"sine": twice}, (x,), (ones, 2.0 * ones), given_out=slice(1))
  (y,) = programs["sine", "forward"].program()
  np.testing.assert_allclose(y, np.sin(x), rtol=1e-6)
  (y,), (dx,) = programs["sine", "forward_backward"].program()
  np.testing.assert_allclose(y, np.sin(x), rtol=1e-6)
  np.testing.assert_allclose(dx, 3.0 * np.cos(x), rtol=1e-6)
