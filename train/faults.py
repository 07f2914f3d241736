"""What a run does when something goes wrong: non-finite steps, and being told to stop."""

import dataclasses
import json
import pathlib
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging

from data.mixture import RowAddress
from train.peers import Peers

_STOPPING = (signal.SIGINT, signal.SIGTERM)


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


def record_failure(workdir: pathlib.Path, *, step: int, error: str) -> None:
  """Writes failure.json, by which a supervisor sees whether the same failure comes again."""
  (workdir / "failure.json").write_text(json.dumps({"step": step, "error": error}) + "\n")


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
  """Ctrl-C or SIGTERM: the first asks all processes to save and leave, the second ends this one.

  `with StopRequest(peers) as stop:` and then ask `stop.reached(step)` at every step; None is only
  this process. `signal_name` is what came to this process, or None. A thread listens: the main one
  may be in a collective that will not end.
  """

  def __init__(self, peers: Peers | None = None):
    self.signal_name: str | None = None
    self._peers = peers or Peers.alone()
    self._previous: dict[int, Any] = {}

  def reached(self, step: int) -> bool:
    """Whether to save and leave after `step` finished steps; the same on all processes."""
    return self._peers.reached(step)

  def __enter__(self) -> "StopRequest":
    listening, self._wakeup = socket.socketpair()
    self._wakeup.setblocking(False)
    # Python's handlers wait for the main thread; this descriptor gets the signal's number at once.
    self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno())
    for number in _STOPPING:
      self._previous[number] = signal.signal(number, lambda *_: None)
    threading.Thread(target=self._listen, args=(listening,), name="signals", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_wakeup)
    self._wakeup.close()

  def _listen(self, listening: socket.socket) -> None:
    asked = False
    with listening:
      while received := listening.recv(1):
        if received[0] not in _STOPPING:
          continue
        name = signal.Signals(received[0]).name
        if asked:
          self._peers.leave(f"{name} again: ended at once", status=128 + received[0])
        asked, self.signal_name = True, name
        logging.warning(
          "%s: saving a checkpoint and leaving; once more ends the process at once", name
        )
        self._peers.ask_to_stop(name)
