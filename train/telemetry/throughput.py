"""How fast training runs: tokens per second, waiting for data, time left, MFU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax


class Rates(NamedTuple):
  """Over the steps since the last reading; compilation, evaluation and saving do not count.

  tokens_per_second: of all processes, padding included. data_wait: the share of the time in which
  the loop waited for its next batch. seconds_left: to the last step, with everything that counts
  above and everything that does not, but for compilation.
  """

  tokens_per_second: float
  step_seconds: float
  data_wait: float
  seconds_left: float


class Throughput:
  """A stopwatch for the loop, made when compilation is over: `count_step` when the result of a step
  has arrived on the host.

  `with excluded(after=...)` around what is not training, `with waiting()` around the next batch.
  """

  def __init__(
    self,
    *,
    tokens_per_step: int,
    start_step: int,
    total_steps: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._tokens_per_step = tokens_per_step
    self._step, self._total_steps = start_step, total_steps
    self._clock = clock
    self._start = self._window_start = clock()
    self._steps = self._window_steps = 0
    self._excluded = self._waited = 0.0

  @contextmanager
  def excluded(self, *, after: Any = ()) -> Iterator[None]:
    """Time inside is not training's. Arrays in `after` are waited for first, as training's time:
    a step that is still running must not be counted as evaluation."""
    jax.block_until_ready(after)
    begin = self._clock()
    try:
      yield
    finally:
      self._excluded += self._clock() - begin

  @contextmanager
  def waiting(self) -> Iterator[None]:
    """Time inside is waiting for data."""
    begin = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - begin

  def count_step(self) -> None:
    """One more step is finished."""
    self._step += 1
    self._steps += 1
    self._window_steps += 1

  def read(self) -> Rates:
    """The rates since the last reading; at least one step must have been counted since."""
    now = self._clock()
    assert self._window_steps > 0, "read before a step was counted"
    # The clock may not have moved at all over the steps of a tiny model.
    seconds = max(now - self._window_start - self._excluded, 1e-9)
    steps_left = self._total_steps - self._step
    rates = Rates(
      tokens_per_second=self._window_steps * self._tokens_per_step / seconds,
      step_seconds=seconds / self._window_steps,
      data_wait=min(1.0, self._waited / seconds),
      seconds_left=steps_left * (now - self._start) / self._steps,
    )
    self._window_start, self._window_steps = now, 0
    self._excluded = self._waited = 0.0
    return rates


def mfu(*, flops_per_token: float, tokens_per_second: float, peak_flops: float) -> float:
  """Model FLOPs utilisation, a fraction: what the model needs over what all chips could do.

  `flops_per_token` is the model's, forward and backward (arXiv:2204.02311, appendix B): what
  rematerialisation computes again does not count. `peak_flops` is per second, over all devices.
  """
  return flops_per_token * tokens_per_second / peak_flops
