"""What a run reports while it trains: console, metrics.jsonl, TensorBoard, wandb; process 0 only.

WORKDIR/metrics.jsonl    one JSON object per line: step, time, and values by the names of FIELDS
WORKDIR/statistics.jsonl one for each step with statistics: see train/layer_statistics.py
WORKDIR/tensorboard/     the same scalars
WORKDIR/wandb/           the same, if asked for; WORKDIR/wandb_run_id is the id of all its restarts
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from absl import logging

from models.statistics import Statistics
from train import layer_statistics
from train.workdir.jsonl import truncate
from train.workdir.whole_file import write_whole

JSONL = "metrics.jsonl"


class Field(NamedTuple):
  """A value: its name in the files, its label in the console line (None: not there), what it is."""

  name: str
  label: str | None
  show: Callable[[float], str]
  meaning: str


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"


# In the order of the console line; docs/training.md has them as a table.
FIELDS = (
  Field(
    "train/loss",
    "loss",
    "{:.4f}".format,
    "mean next-token loss of the step's batch, in nats per target, without the z-loss",
  ),
  Field("eval/loss", "eval", "{:.4f}".format, "the same over the fixed held-out rows"),
  Field(
    "eval/bits_per_byte",
    "bits/byte",
    "{:.4f}".format,
    "the held-out loss in bits per byte of text, comparable between vocabularies",
  ),
  Field("eval/seconds", None, "{:.1f}".format, "how long the evaluation took"),
  Field("train/learning_rate", "lr", "{:.2e}".format, "learning rate of the step"),
  Field("train/grad_norm", "norm", "{:.3f}".format, "global norm of the gradient, before clipping"),
  Field("train/z_loss", None, "{:.4f}".format, "mean of log(Z)^2, before its coefficient"),
  Field(
    "train/targets", None, "{:.0f}".format, "targets in the batch: next tokens of the same document"
  ),
  Field(
    "train/tokens_per_second",
    "tokens/s",
    "{:,.0f}".format,
    "all devices, since the last line; compilation, evaluation and saving do not count",
  ),
  Field("train/step_seconds", "s/step", "{:.3g}".format, "seconds per step, counted likewise"),
  Field(
    "train/mfu",
    "MFU",
    "{:.1%}".format,
    "model FLOPs utilisation: FLOPs the model needs (nothing recomputed) over the chips' peak; "
    "only on chips whose peak is known",
  ),
  Field("train/data_wait", "data", "{:.1%}".format, "share of the time spent waiting for data"),
  Field(
    "train/skipped_steps",
    "skipped",
    "{:.0f}".format,
    "steps so far that changed nothing: not finite, or a spike",
  ),
  Field(
    "train/passed_over",
    "passed over",
    "{:.0f}".format,
    "batches that are never read again, because of a bad step",
  ),
  Field(
    "train/goodput",
    "goodput",
    "{:.1%}".format,
    "share of all time since the first start, with restarts, spent in steps that were kept",
  ),
  Field(
    "train/seconds_left",
    "left",
    _duration,
    "time to the last step at the pace so far, evaluation and saving included (h:mm:ss)",
  ),
)
_BY_NAME = {field.name: field for field in FIELDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
  """How often and where to; the JSONL file is always written.

  wandb "offline" needs no network: `wandb sync WORKDIR/wandb/offline-run-*` uploads it later.
  """

  recorded_as: ClassVar[str] = "train.metrics.MetricsConfig"

  log_every: int = 10
  tensorboard: bool = True
  wandb: Literal["disabled", "offline", "online"] = "disabled"
  wandb_project: str = "griffin-pretrain"

  def __post_init__(self):
    if self.log_every < 1:
      raise ValueError(f"MetricsConfig: log_every {self.log_every} must be at least 1")
    if self.wandb not in ("disabled", "offline", "online"):
      raise ValueError(
        f"MetricsConfig: wandb {self.wandb!r} is none of 'disabled', 'offline', 'online'"
      )


class Metrics:
  """Writes scalars of steps after `start_step`; use it in a `with`, on every process.

  What an earlier run wrote of later steps is removed: after a restart each step is there once.
  `settings` is shown with the run in wandb.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    config: MetricsConfig,
    *,
    name: str,
    settings: Mapping[str, Any],
    start_step: int,
    total_steps: int,
  ):
    self.config = config
    self._start_step, self._total_steps = start_step, total_steps
    self._is_open = jax.process_index() == 0
    self._has_told_about = False
    self._tensorboard: Any = None
    self._wandb: Any = None
    if not self._is_open:
      return
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    truncate(folder / JSONL, start_step)
    self._jsonl = (folder / JSONL).open("a", encoding="utf-8")
    truncate(folder / layer_statistics.JSONL, start_step)
    self._layers = (folder / layer_statistics.JSONL).open("a", encoding="utf-8")
    if config.tensorboard:
      self._tensorboard = _open_tensorboard(folder / "tensorboard", start_step)
    if config.wandb != "disabled":
      self._wandb = _open_wandb(folder, config, name, settings)

  def due(self, step: int) -> bool:
    """Whether the loop should write this step: each multiple of log_every, the first, the last."""
    is_end = step in (self._start_step + 1, self._total_steps)
    return is_end or step % self.config.log_every == 0

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of one step, by their names in FIELDS, everywhere at once."""
    unknown = sorted(set(values) - set(_BY_NAME))
    if unknown:
      raise ValueError(f"Metrics: {unknown[0]!r} is not in FIELDS; say there what it means")
    if not self._is_open:
      return
    plain = {key: float(value) for key, value in values.items()}
    record = {"step": step, "time": round(time.time(), 3)}
    # JSON has no NaN: "nan" and "inf" as strings, which float() reads.
    record |= {key: x if math.isfinite(x) else str(x) for key, x in plain.items()}
    self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
    self._jsonl.flush()
    self._send(step, plain)
    logging.info("%s", console_line(step, self._total_steps, plain))

  def write_layers(
    self, step: int, columns: Mapping[str, Any], *, about: Sequence[Statistics]
  ) -> None:
    """Writes one step's columns of train/layer_statistics.py: a line of their file, and scalars
    "layers/<name>/<block>" everywhere else, the middle one where there are several quantiles.
    `about` declares the columns; it is in the first line that this process writes."""
    if not self._is_open:
      return
    record = {"step": step, "time": round(time.time(), 3), **columns}
    if not self._has_told_about:
      record["about"] = [statistics.as_json() for statistics in about]
      self._has_told_about = True
    self._layers.write(json.dumps(record, allow_nan=False) + "\n")
    self._layers.flush()
    scalars = {
      f"layers/{name}/{block:02}": value[len(value) // 2] if isinstance(value, list) else value
      for name, column in columns.items()
      if isinstance(column, list)
      for block, value in enumerate(column)
      if value is not None and not isinstance(value, str)
    }
    self._send(step, scalars)

  def _send(self, step: int, values: Mapping[str, float]) -> None:
    """To TensorBoard and wandb."""
    if self._tensorboard is not None:
      self._tensorboard.write(step, values)
    if self._wandb is not None:
      self._wandb.log({"step": step, **values})

  def close(self) -> None:
    """Flushes and closes all files."""
    if not self._is_open:
      return
    self._is_open = False
    self._jsonl.close()
    self._layers.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
  """One line for people: "step 100/500 | loss 2.3026 | tokens/s 12,345 | left 0:01:02"."""
  shown = [
    f"{field.label} {field.show(values[field.name])}"
    for field in FIELDS
    if field.label is not None and field.name in values
  ]
  width = len(str(total_steps))
  return " | ".join([f"step {step:>{width}}/{total_steps}", *shown])


def fields_table() -> str:
  """FIELDS as a Markdown table, for docs/training.md."""
  rows: Iterable[str] = (
    f"| {field.label or ''} | `{field.name}` | {field.meaning} |" for field in FIELDS
  )
  return "\n".join(["| console | metrics.jsonl | meaning |", "|---|---|---|", *rows]) + "\n"


def _open_tensorboard(folder: pathlib.Path, start_step: int) -> Any:
  # Imported where it is asked for: it takes most of a second of every start.
  from train.telemetry.tensorboard import EventFile

  return EventFile(folder, start_step)


def _open_wandb(
  folder: pathlib.Path, config: MetricsConfig, name: str, settings: Mapping[str, Any]
) -> Any:
  # Imported where it is asked for: it takes seconds of every start.
  import wandb
  import wandb.errors

  id_file = folder / "wandb_run_id"
  if not id_file.exists():
    write_whole(id_file, uuid.uuid4().hex[:12] + "\n")
  try:
    run = wandb.init(
      project=config.wandb_project,
      name=name,
      id=id_file.read_text().strip(),
      resume="allow" if config.wandb == "online" else None,
      mode=config.wandb,
      dir=str(folder),
      config=dict(settings),
      settings=wandb.Settings(console="off", silent=True),
    )
  except wandb.errors.Error as error:
    raise ValueError(
      f"wandb does not start ({error}); log in with `wandb login`, or train without the network: "
      "metrics.wandb=offline"
    ) from error
  # wandb drops what is logged below its own step counter, as every restart would.
  run.define_metric("*", step_metric="step")
  return run
