"""What a run does when something goes wrong: non-finite steps, and being told to stop."""

import dataclasses
import json
import pathlib
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal

import jax
import numpy as np
from absl import logging

from data.mixture import RowAddress


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonFinitePolicy:
  """A step whose loss or gradient is not finite changes no parameter, whatever the policy.

  action "stop" ends the run there; "skip" goes on, up to `max_skipped` such steps in a row.
  """

  action: Literal["stop", "skip"] = "stop"
  max_skipped: int = 10

  def __post_init__(self):
    if self.action not in ("stop", "skip"):
      raise ValueError(f"NonFinitePolicy: action {self.action!r} is none of 'stop', 'skip'")
    if self.max_skipped < 1:
      raise ValueError(f"NonFinitePolicy: max_skipped {self.max_skipped} must be at least 1")


class NonFiniteError(RuntimeError):
  """The run stopped at a loss or gradient that is not finite; the message says where."""


def bad_tensors(square_norms: Any, *, limit: int = 8) -> list[str]:
  """Paths of the first parameters whose gradient is not finite, with the layers in brackets."""
  names = []
  for path, norm in jax.tree_util.tree_leaves_with_path(square_norms):
    bad = ~np.isfinite(np.asarray(norm))
    if bad.any():
      layers = "".join(f"{list(map(int, index))}" for index in np.argwhere(bad)[:3] if index.size)
      names.append("/".join(str(key.key) for key in path) + layers)
  return names[:limit]


def record_bad_step(
  directory: pathlib.Path,
  *,
  step: int,
  loss: float,
  grad_norm: float,
  rows: Sequence[RowAddress],
  tensors: Sequence[str],
) -> str:
  """Writes bad_steps/<step>.json, from which the rows can be replayed; returns one line for people.

  `step` is the number of the step that failed, counted from 1; `rows` are those of its batch, which
  `data.pipeline.read_rows` reads again.
  """
  record = {
    "step": step,
    "loss": repr(loss),
    "grad_norm": repr(grad_norm),
    "rows": [row._asdict() for row in rows],
    "tensors": list(tensors),
  }
  path = directory / "bad_steps" / f"{step:08d}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record) + "\n")
  shown = ", ".join(f"{row.row} of source {row.source}" for row in rows[:8])
  shown += f" and {len(rows) - 8} more" if len(rows) > 8 else ""
  where = ", ".join(tensors) if tensors else "no gradient, only the loss"
  return (
    f"step {step}: loss {loss} and gradient norm {grad_norm} are not finite. Rows: {shown}. "
    f"Not finite: {where}. Written to {path}"
  )


def advice(policy: NonFinitePolicy, skipped_in_a_row: int) -> str:
  """What can be done after the run has stopped."""
  if policy.action == "stop":
    return (
      "The last checkpoint is from before it. non_finite.action=skip goes on without such steps; "
      "else lower optimizer.peak_lr, or look at the rows"
    )
  return (
    f"{skipped_in_a_row} such steps in a row are more than non_finite.max_skipped "
    f"{policy.max_skipped}: lower optimizer.peak_lr and start again from an earlier checkpoint"
  )


class StopRequest:
  """Ctrl-C or SIGTERM: the first asks the loop to save and leave, the second ends at once.

  `with StopRequest() as stop:` and then read `stop.signal_name`, None until a signal came.
  """

  def __init__(self):
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal_name = signal.Signals(number).name
    logging.warning(
      "%s: saving a checkpoint and leaving; once more ends the process at once", self.signal_name
    )
    for other, handler in self._previous.items():
      signal.signal(other, handler)
