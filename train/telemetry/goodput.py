"""Goodput: what the event log of a run (events.py) says about where its time went."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

from train.workdir.jsonl import read_jsonl

JSONL, HEARTBEAT = "events.jsonl", "heartbeat.json"

# What the loop does, one at a time.
Activity = Literal["init", "compile", "restore", "step", "data_wait", "checkpoint", "evaluation"]
# lost: steps, waiting and evaluations after the step that a later restart began from, so done in
# vain. idle: from the end of one process to the start of the next, unless the run was complete.
KINDS: tuple[str, ...] = (*get_args(Activity), "lost", "idle")
_LOSABLE = ("step", "data_wait", "evaluation")


class Piece(NamedTuple):
  """`kind` (of KINDS) from `start` to `end`, in seconds since 1970."""

  kind: str
  start: float
  end: float
  # Of steps the first and the last, (n + 1, n) if none was finished; of evaluations (n, n).
  steps: tuple[int, int] | None = None


class Start(NamedTuple):
  """One start of a process, and the step it went on from: None if it did not get that far."""

  time: float
  step: int | None
  about: dict[str, Any]


class Log(NamedTuple):
  """All starts of a run, and its time in pieces without gaps between them."""

  pieces: list[Piece]
  starts: list[Start]
  outcome: str | None  # of the last process; None: killed, or still at work
  end: float  # of the last line
  tail: dict[str, Any] | None  # the line that the last process could not write
  heartbeat: float | None  # when a process was last seen alive

  def seconds(self) -> dict[str, float]:
    """Time of each of KINDS. Their sum is all the time from the first start to the last event."""
    total = dict.fromkeys(KINDS, 0.0)
    for piece in self.pieces:
      total[piece.kind] += piece.end - piece.start
    return total


def read(workdir: str | os.PathLike[str]) -> Log:
  """The log of `workdir`; empty where there is none. Lines that are not whole are passed over."""
  folder = pathlib.Path(workdir)
  reader = _Reader()
  for line in _lines(folder / JSONL):
    reader.add(line)
  beat = next(iter(_lines(folder / HEARTBEAT)), None)
  tail = None
  if beat is not None and reader.is_open and beat["time"] > reader.end:
    tail = beat
    reader.add(tail)
  return Log(
    reader.pieces,
    reader.starts,
    reader.outcome,
    reader.end,
    tail,
    None if beat is None else beat["time"],
  )


class _Reader:
  """Line after line, into pieces."""

  def __init__(self):
    self.pieces: list[Piece] = []
    self.starts: list[Start] = []
    self.outcome: str | None = None
    self.end = 0.0
    self.is_open = False
    self._step = 0  # the last that is known to be over
    self._before = 0  # how many pieces there were before this start
    self._was_complete = False  # what it found

  def add(self, line: dict[str, Any]) -> None:
    if not self.starts and line["kind"] != "start":
      return
    start, self.end = self.end, max(self.end, line["time"])
    match line["kind"]:
      case "start":
        self._before, self._was_complete = len(self.pieces), self.outcome == "complete"
        if self.starts and not self._was_complete:
          self.pieces.append(Piece("idle", start, self.end))
        about = {name: value for name, value in line.items() if name not in ("time", "kind")}
        self.starts.append(Start(self.end, None, about))
        self.is_open, self.outcome = True, None
      case "resume":
        if self.starts[-1].step is None:
          self.starts[-1] = self.starts[-1]._replace(step=line["step"])
        # Else the same process went back to a checkpoint: no restart, but work is lost.
        self._step = line["step"]
        self.pieces = [part for piece in self.pieces for part in _without_lost(piece, self._step)]
      case "end":
        self.is_open, self.outcome = False, line["outcome"]
        if self.starts[-1].step is None and (self.outcome == "complete" or self._was_complete):
          # It found nothing left to do, or was refused: as with another seed.
          self.outcome = "complete"
          del self.pieces[self._before :], self.starts[-1]
      case kind if kind in KINDS:
        self._add_piece(kind, start, line)

  def _add_piece(self, kind: str, start: float, line: dict[str, Any]) -> None:
    if kind == "step" or "steps" in line:
      # No step was finished: the next one was running.
      first, last = line.get("steps", (self._step + 1, self._step))
      self._step = last
      waited = min(line.get("data_wait", 0.0), self.end - start)
      if waited > 0:
        self.pieces.append(Piece("data_wait", start, start + waited, (first, last)))
      self.pieces.append(Piece(kind, start + waited, self.end, (first, last)))
    else:
      steps = (self._step, self._step) if kind in _LOSABLE else None
      self.pieces.append(Piece(kind, start, self.end, steps))


def _without_lost(piece: Piece, step: int) -> Iterable[Piece]:
  """The piece, or its parts, when all after `step` has to be done again."""
  if piece.kind not in _LOSABLE or piece.steps is None:
    return [piece]
  first, last = piece.steps
  if first > step:
    return [piece._replace(kind="lost")]
  if last <= step:
    return [piece]
  border = piece.start + (piece.end - piece.start) * (step - first + 1) / (last - first + 1)
  return [
    piece._replace(end=border, steps=(first, step)),
    piece._replace(kind="lost", start=border, steps=(step + 1, last)),
  ]


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [
    line
    for line in read_jsonl(path)
    if "kind" in line and isinstance(line.get("time"), int | float)
  ]
