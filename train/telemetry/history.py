"""A run as its folder shows it, at any time: still going, killed, or of an older version."""

import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

from models.statistics import Statistics, of_json
from train.telemetry import goodput
from train.workdir.jsonl import read_jsonl, series

_SECONDS_OF_SILENCE = 30.0
_OLDER = pathlib.Path(__file__).with_name("older_statistics.json")


class History(NamedTuple):
  """What a run has left. Series map a step to a finite value; a name without records is empty."""

  name: str
  workdir: pathlib.Path
  total_steps: int | None
  tokens_per_step: int | None
  flops_per_token: float | None
  row_length: int | None
  devices: str | None
  metrics: dict[
    str, dict[int, float]
  ]  # by the names of train/telemetry/metrics.py FIELDS, and "time"
  layers: list[dict[str, Any]]  # lines of train/layer_statistics.py, the last of each step
  log: goodput.Log
  missing: list[str]  # sentences: what cannot be shown, and why

  @property
  def step(self) -> int:
    """The last step that something is known of."""
    return max(self.metrics["time"], default=0)

  @property
  def restarts(self) -> list[goodput.Start]:
    """Starts that went on from a step, but for the first."""
    return [start for start in self.log.starts if start.step is not None][1:]

  @property
  def state(self) -> str:
    """Complete, running, killed or how else it ended, in words."""
    match self.log.outcome:
      case "complete":
        return "complete"
      case "stopped":
        return "stopped by a signal, saved"
      case str(outcome):
        return f"ended by {outcome}"
    if self.log.heartbeat is None:
      return "complete" if self.step == self.total_steps else "not known"
    silence = time.time() - self.log.heartbeat
    return "running" if silence < _SECONDS_OF_SILENCE else f"killed {duration(silence)} ago"

  @property
  def goodput(self) -> float | None:
    """The share of all time that went into steps that were kept; None without a log."""
    seconds = self.log.seconds()
    total = sum(seconds.values())
    return seconds["step"] / total if total else None

  def began(self) -> float:
    """Seconds since 1970 of the first start, or of the first record where there is no log."""
    if self.log.starts:
      return self.log.starts[0].time
    return min(self.metrics["time"].values(), default=0.0)

  def last(self, name: str) -> float | None:
    """The newest value of a series."""
    values = self.metrics.get(name, {})
    return values[max(values)] if values else None

  def median(self, name: str) -> float | None:
    """The median over all records."""
    values = self.metrics.get(name, {})
    return statistics.median(values.values()) if values else None

  @property
  def statistics(self) -> list[Statistics]:
    """What the blocks recorded, as the last start declared it. Older runs declared nothing: for
    them it is what was recorded then (older_statistics.json)."""
    said = [line["about"] for line in self.layers if "about" in line]
    if said:
      return [of_json(value) for value in said[-1]]
    older = of_json(json.loads(_OLDER.read_text(encoding="utf-8")))
    return [older] if any(self.layer(older.columns[0].name)) else []

  def layer(self, name: str) -> list[dict[int, Any]]:
    """For each block, step -> value of a column of statistics.jsonl; empty for one without it."""
    columns: list[dict[int, Any]] = []
    for line in self.layers:
      values = line.get(name, [])
      columns += [{} for _ in range(len(values) - len(columns))]
      for column, value in zip(columns, values):
        if value is not None:
          column[line["step"]] = value
    return columns


def read(workdir: str | pathlib.Path) -> History:
  """The history of the run in `workdir`; ValueError where there is none."""
  folder = pathlib.Path(workdir)
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder")
  log = goodput.read(folder)
  records = read_jsonl(folder / "metrics.jsonl")
  if not records and not log.starts:
    raise ValueError(f"{folder} holds no run: it has neither metrics.jsonl nor events.jsonl")
  names = {name for record in records for name in record} - {"step"} | {"time"}
  lines = {line["step"]: line for line in read_jsonl(folder / "statistics.jsonl")}
  settings = _settings(folder / "config.json")
  about = log.starts[-1].about if log.starts else {}
  batch, row = settings.get("batch_size"), settings.get("data.row_length")
  history = History(
    name=about.get("name") or settings.get("name") or folder.name,
    workdir=folder,
    total_steps=about.get("total_steps") or settings.get("total_steps"),
    tokens_per_step=about.get("tokens_per_step") or (batch and row and batch * row),
    flops_per_token=about.get("flops_per_token"),
    row_length=about.get("row_length") or row,
    devices=about.get("devices"),
    metrics={name: series(records, name) for name in names},
    layers=[lines[step] for step in sorted(lines)],
    log=log,
    missing=[],
  )
  return history._replace(missing=_missing(history))


def duration(seconds: float) -> str:
  """A time in its largest unit, as people say it: "40 s", "12 min", "3.5 h", "12 days"."""
  for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
    if seconds >= 1.5 * size:
      value = seconds / size
      return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
  return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _missing(history: History) -> list[str]:
  missing = []
  if not history.metrics.get("train/loss"):
    missing.append("no step has been logged yet (metrics.jsonl): no losses")
  if not history.metrics.get("eval/loss"):
    missing.append("no evaluation yet, or no data.eval_source: no held-out loss")
  if not history.log.starts:
    missing.append("no events.jsonl (a run of an older version): no goodput, no restarts")
  if history.tokens_per_step is None:
    missing.append("neither events.jsonl nor config.json: steps instead of tokens")
  if history.flops_per_token is None:
    missing.append("no FLOPs of the model are recorded: no loss over FLOPs")
  if not history.layers:
    missing.append(
      "no statistics.jsonl yet (statistics.every is None, or that many steps are not done): "
      "nothing of single layers"
    )
  elif not history.statistics:
    missing.append("no block records anything of its own (models/statistics.py): norms only")
  return missing


def _settings(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    settings = json.loads(path.read_text())
  except ValueError:  # cut off when it was written
    return {}
  return settings if isinstance(settings, dict) else {}
