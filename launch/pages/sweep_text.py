"""A sweep's plan and progress as lines for people."""

import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from train.scaling.runner import OUTPUT, is_running
from train.scaling.sweep import Changes, Record, State, flops_name, last_step, phase
from train.telemetry.metrics import JSONL


class Estimate(NamedTuple):
  """What a run needs: wall-clock seconds (None: not known yet) and bytes of a device."""

  seconds: float | None
  memory_bytes: float
  fits: bool


def plan_lines(
  state: State,
  estimates: Mapping[str, Estimate],
  *,
  chips: int,
  price: float | None,
  source: str,
) -> Iterable[str]:
  """A row for each run, and their sum; `price` is for one chip and hour."""
  rows = [["run", "params", "tokens", "epochs", "FLOPs", "steps", "rows", "lr", "GB", "time"]]
  rows[0] += [] if price is None else ["cost"]
  for name, record in state.in_grid.items():
    one = estimates[name]
    settings = record["settings"]
    row = [
      name,
      short(record["parameters"]),
      short(record["tokens"]),
      "?" if record["epochs"] is None else f"{record['epochs']:.2g}",
      flops_name(float(f"{record['flops']:.2e}")),
      f"{record['steps']:,}",
      f"{settings['batch_size']} x {settings['data.row_length']}",
      f"{settings['optimizer.peak_lr']:.2g}",
      f"{one.memory_bytes / 1e9:.2g}" + ("" if one.fits else " TOO MUCH"),
      "done" if record["result"] is not None else duration(one.seconds),
    ]
    rows.append(row + ([] if price is None else [_cost(one.seconds, chips, price)]))
  yield from table(rows)
  left = [name for name, record in state.in_grid.items() if record["result"] is None]
  flops = sum(state.runs[name]["flops"] for name in left)
  total = f"{len(left)} of {len(state.in_grid)} runs are left, {flops:.2e} FLOPs"
  seconds = [estimates[name].seconds for name in left]
  known = [one for one in seconds if one is not None]
  if left and len(known) < len(left):
    yield f"{total}; how long they take is known once one has finished (or --flops_per_second)"
  elif left:
    cost = "" if price is None else f", cost {_cost(sum(known), chips, price)}"
    yield f"{total}: {duration(sum(known))} one after the other{cost} ({source})"
  else:
    yield total


def status_lines(state: State, *, max_attempts: int) -> Iterable[str]:
  """A row for each run: its state, step and loss, and how long ago it last wrote metrics."""
  rows = [["run", "state", "step", "loss", "last heard of"]]
  counts: dict[str, int] = {}
  for name, record in state.in_grid.items():
    folder = state.run_folder(name)
    now = phase(
      record,
      is_running=is_running(folder),
      has_started=folder.exists(),
      max_attempts=max_attempts,
    )
    counts[now] = counts.get(now, 0) + 1
    step = record["steps"] if now == "done" else last_step(folder)
    result = record["result"]
    metrics = folder / JSONL
    heard = f"{duration(time.time() - metrics.stat().st_mtime)} ago" if metrics.exists() else ""
    loss = "" if result is None else f"{result['loss']:.4f}"
    rows.append([name, _state_words(now, record), f"{step:,}/{record['steps']:,}", loss, heard])
  yield from table(rows)
  yield ", ".join(f"{count} {now}" for now, count in counts.items())
  for name, record in state.in_grid.items():
    if record["attempts"] >= max_attempts and record["result"] is None:
      yield f"{name} failed: see {state.run_folder(name) / OUTPUT}"
  gone = [name for name, record in state.runs.items() if not record["in_grid"]]
  if gone:
    yield f"not in the grid any more, kept on disk: {', '.join(gone)}"


def changes_lines(changes: Changes) -> list[str]:
  """What was added to the grid, removed from it and altered in it since the last time."""
  lines = []
  for word, names in (("added", changes.added), ("removed", changes.removed)):
    if names:
      lines.append(f"{word} since the last time, {len(names)} runs: {', '.join(names)}")
  for name, differences in changes.altered.items():
    lines.append(f"altered since the last time: {name}: {', '.join(differences)}")
  return lines


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
  """Lines with aligned columns: the first is flush left, the others are flush right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
    yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()


def short(number: float) -> str:
  """12.3k, 4.56M, 7.89B: three digits."""
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


def duration(seconds: float | None) -> str:
  """h:mm:ss, or days and hours."""
  return "?" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _cost(seconds: float | None, chips: int, price: float) -> str:
  return "?" if seconds is None else f"{seconds / 3600 * chips * price:,.2f}"


def _state_words(now: str, record: Record) -> str:
  attempts = record["attempts"]
  return f"{now}, {attempts} attempts failed" if attempts and now != "done" else now
