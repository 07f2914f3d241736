"""The held-out loss: a fixed set of rows, in a fixed order, every target counted once."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from data.rows import Batch
from train.loss import LossSums


class Evaluation(NamedTuple):
  """Means over the held-out targets."""

  loss: float  # nats per target
  bits_per_byte: float  # of the text that the targets stand for
  num_targets: int


def evaluate(
  eval_step: Callable[[Any, Batch], LossSums],
  params: Any,
  batches: Iterable[Batch],
  *,
  bytes_per_target: float,
) -> Evaluation:
  """The loss over all of `batches`, which are global arrays; `eval_step` is jitted."""
  loss, weight = 0.0, 0.0
  waiting: LossSums | None = None
  for batch in batches:
    sums = eval_step(params, batch)
    # The host adds up the batch before, so that the device never waits for it.
    if waiting is not None:
      loss, weight = loss + float(waiting.loss), weight + float(waiting.weight)
    waiting = sums
  if waiting is not None:
    loss, weight = loss + float(waiting.loss), weight + float(waiting.weight)
  if weight == 0:
    raise ValueError("evaluate: the held-out rows have no target; prepare a larger held-out store")
  mean = loss / weight
  return Evaluation(mean, mean / math.log(2.0) / bytes_per_target, int(weight))
