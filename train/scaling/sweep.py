"""A sweep: its runs, what each costs, and SWEEP/sweep.json, the progress of each.

SWEEP/sweep.json       this state, written whole or not at all; a result is copied into it once
SWEEP/runs/NAME/       the folder of each run, as `python -m launch.train` makes it
"""

import dataclasses
import fnmatch
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from data import token_store
from data.bucket import is_url
from models import kernel_fields
from models.flops import count_params, flops_per_token
from sharding.mesh import MeshShape
from train.config import Run, flatten
from train.planning.footprint import footprint
from train.recorded import default_values, new_at_default
from train.telemetry.metrics import JSONL
from train.workdir.jsonl import read_jsonl
from train.workdir.whole_file import write_whole

STATE = "sweep.json"
FORMAT = "sweep 1"
# Settings of a run that leave its result as it is, but for rounding: they may change at any time,
# and so may kernels. XLA flags may do more, and are no such setting.
NO_EFFECT = (
  "name",
  "mesh*",
  "zero_stage",
  "gradient_sums",
  "num_microbatches",
  "checkpoint*",
  "metrics*",
  "statistics*",
  # Beyond them a run stops, without a result. What else bad_steps sets decides which steps change
  # the parameters and which batches are read, and so the loss.
  "bad_steps.max_skipped",
  "bad_steps.max_rollbacks",
  "watchdog*",
  "model.remat",
  "model.layers",
  "data.read_threads",
  "data.prefetch_batches",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One run of a sweep. `name` is its folder and, after the sweep's own, its config's argument.

  budget: its FLOPs, equal for the runs of an isoFLOP curve; None if the config sets tokens instead.
  """

  name: str
  family: str
  budget: float | None
  run: Run

  def __post_init__(self):
    parts = self.name.split("/")
    if not all(parts) or any(set(part) - _NAME_CHARACTERS or part in (".", "..") for part in parts):
      raise ValueError(
        f"Point: name {self.name!r} must be letters, digits, '.', '-', '_' and '/' between them: "
        "it is a folder"
      )


_NAME_CHARACTERS = {*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"}


class Facts(NamedTuple):
  """What is known about a run before it starts. Parameters count the tied embedding once, because
  as the unembedding it takes part in every FLOP count; `flops` are those of training, logits
  included (models/flops.py)."""

  parameters: int
  embedding: int
  tokens: int
  steps: int
  flops: float
  memory_bytes: float  # of one device, by train/planning/footprint.py
  epochs: float | None  # passes over the data; None while it is not prepared, or in a bucket


def facts(run: Run) -> Facts:
  """The costs of `run`; mesh axes of -1 count as one device."""
  count = count_params(run.model)
  tokens = run.batch_size * run.data.row_length * run.total_steps
  sizes = {axis: max(1, getattr(run.mesh, axis)) for axis in ("data", "fsdp", "sequence", "tensor")}
  stores = [path for path, _ in run.data.sources]
  available = (
    sum(token_store.read_manifest(path).num_tokens for path in stores)
    # A plan must be possible where the bucket cannot be reached.
    if all(not is_url(path) and token_store.is_complete(path) for path in stores)
    else None
  )
  return Facts(
    parameters=count.total,
    embedding=count.embedding,
    tokens=tokens,
    steps=run.total_steps,
    flops=tokens * flops_per_token(run.model, run.data.row_length).train,
    memory_bytes=footprint(run, MeshShape(**sizes), platform="cpu").total,
    epochs=None if available is None else tokens / available,
  )


def flops_name(flops: float) -> str:
  """FLOPs as in 1e13 or 2.5e12: short, and usable in a folder's name."""
  digits, _, exponent = f"{flops:.6e}".partition("e")
  return f"{float(digits):g}e{int(exponent)}"


# A run's record in sweep.json, by name: family, budget, the Facts, settings (path -> value),
# attempts (that failed), seconds (that runs took here), submitted (what the cluster said, or None),
# result (or None), in_grid.
Record = dict[str, Any]


class State:
  """The content of sweep.json. Change `runs`, then `save`."""

  def __init__(self, folder: pathlib.Path, config: str, arguments: list[str]):
    self.folder, self.config, self.arguments = folder, config, arguments
    self.runs: dict[str, Record] = {}

  @property
  def in_grid(self) -> dict[str, Record]:
    return {name: record for name, record in self.runs.items() if record["in_grid"]}

  def run_folder(self, name: str) -> pathlib.Path:
    return self.folder / "runs" / name

  def save(self) -> None:
    """Writes sweep.json completely or not at all, even if the power fails."""
    content = {
      "format": FORMAT,
      "config": self.config,
      "arguments": self.arguments,
      "runs": self.runs,
    }
    write_whole(self.folder / STATE, json.dumps(content, indent=1))

  @classmethod
  def load(cls, folder: pathlib.Path) -> "State":
    """The state in `folder`; ValueError if there is none, or one of another format."""
    path = folder / STATE
    if not path.is_file():
      raise ValueError(f"{folder} is not a sweep: it has no {STATE}")
    try:
      content = json.loads(path.read_text())
    except ValueError as error:
      raise ValueError(f"{path} is damaged: {error}; use another --workdir") from error
    if content.get("format") != FORMAT:
      raise ValueError(f"{path} has format {content.get('format')!r}, this code reads {FORMAT!r}")
    state = cls(folder, content["config"], content["arguments"])
    state.runs = content["runs"]
    return state


class Changes(NamedTuple):
  """How a grid differs from the one in sweep.json; `altered` has the changed settings by run."""

  added: list[str]
  removed: list[str]
  altered: dict[str, list[str]]


def settings_of(run: Run) -> dict[str, Any]:
  """Path -> value of every setting, as JSON gives it back."""
  return _as_json(flatten(run))


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
  return json.loads(json.dumps(settings, default=repr))


def compare(runs: Mapping[str, Record], points: Sequence[Point]) -> Changes:
  """The differences of `points`, today's grid, by run and path of the setting."""
  known = {name for name, record in runs.items() if record["in_grid"]}
  names = [point.name for point in points]
  altered = {}
  for point in points:
    if point.name in runs and (lines := _differences(runs[point.name]["settings"], point.run)):
      altered[point.name] = lines
  return Changes(
    added=[name for name in names if name not in known],
    removed=[name for name in known if name not in names],
    altered=altered,
  )


def _differences(before: Mapping[str, Any], run: Run) -> list[str]:
  now = settings_of(run)
  kernels = {f"model.{field.path}" for field in kernel_fields.marked(run.model)}
  defaults = {path: _as_json(flatten(default, path)) for path, default in default_values(run)}
  return [
    f"{path} {before.get(path)!r} -> {now.get(path)!r}"
    for path in sorted({*before, *now} - kernels - new_at_default(before, now, defaults))
    if before.get(path) != now.get(path)
    and not any(fnmatch.fnmatchcase(path, pattern) for pattern in NO_EFFECT)
  ]


def new_record(point: Point) -> Record:
  return {
    "family": point.family,
    "budget": point.budget,
    **facts(point.run)._asdict(),
    "settings": settings_of(point.run),
    "attempts": 0,
    "seconds": 0.0,
    "submitted": None,
    "result": None,
    "in_grid": True,
  }


def read_result(folder: pathlib.Path, steps: int) -> dict[str, float] | None:
  """The held-out loss after the last step, in nats per token, and the speed of the run; None unless
  the run is complete."""
  records = read_jsonl(folder / JSONL)
  last = next((record for record in reversed(records) if "eval/loss" in record), None)
  if last is None or last["step"] != steps:
    return None
  speeds = sorted(
    float(record["train/tokens_per_second"])
    for record in records
    if "train/tokens_per_second" in record
  )
  loss = float(last["eval/loss"])
  if not math.isfinite(loss):
    return None
  return {
    "loss": loss,
    "bits_per_byte": float(last["eval/bits_per_byte"]),
    "tokens_per_second": speeds[len(speeds) // 2],
  }


Phase = Literal["done", "failed", "running", "submitted", "stopped", "waiting"]


def phase(record: Record, *, is_running: bool, has_started: bool, max_attempts: int) -> Phase:
  """The progress of a run."""
  if record["result"] is not None:
    return "done"
  if is_running:
    return "running"
  if record["attempts"] >= max_attempts:
    return "failed"
  if record["submitted"] is not None:
    return "submitted"
  return "stopped" if has_started else "waiting"


def last_step(folder: pathlib.Path) -> int:
  """The last step in a run's metrics; 0 before the first."""
  return max((record["step"] for record in read_jsonl(folder / JSONL)), default=0)


class Speed(NamedTuple):
  """What finished runs predict for later ones."""

  flops_per_second: float
  start_seconds: float  # to start, compile, evaluate and save


def measured_speed(record: Record, others: Iterable[Record]) -> Speed | None:
  """The speed of the finished run nearest in size, of the same family if there is one."""
  done = [one for one in others if one["result"] is not None and one["seconds"] > 0]
  done = [one for one in done if one["family"] == record["family"]] or done
  if not done:
    return None
  nearest = min(done, key=lambda one: abs(math.log(one["parameters"] / record["parameters"])))
  rate = nearest["result"]["tokens_per_second"] * nearest["flops"] / nearest["tokens"]
  starts = sorted(
    one["seconds"] - one["tokens"] / one["result"]["tokens_per_second"] for one in done
  )
  return Speed(rate, max(0.0, starts[len(starts) // 2]))
