"""A whole run as one value, and the checks that need more than one part of it."""

import dataclasses
from typing import Any, Literal

from data.pipeline import DataConfig
from models.decoder import DecoderConfig
from sharding.mesh import MeshShape
from sharding.xla_flags import XlaFlags
from train.bad_steps import BadStepPolicy
from train.checkpoint.checkpoints import CheckpointConfig
from train.job.watchdog import WatchdogConfig
from train.layer_statistics import StatisticsConfig
from train.optimizer import AdamW
from train.telemetry.metrics import MetricsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What `python -m launch.train` runs. `batch_size` is in rows, over all devices and microbatches.

  zero_stage: what is split over the mesh axis `fsdp`: 1 moments, 2 gradients too, 3 parameters too.
  gradient_sums: in what gradients are summed over devices, "activations" (the dtype of those, as
  layers compute) or "float32", for twice the bytes. Sums on a device and of microbatches are
  float32.
  z_loss multiplies the mean of log(Z)^2. eval_every and total_steps are in optimizer steps.
  init_from: a Hugging Face directory with the parameters to begin with, on every process. It is
  read only where there is no checkpoint to go on from.
  """

  name: str
  model: DecoderConfig
  data: DataConfig
  optimizer: AdamW
  batch_size: int
  total_steps: int
  num_microbatches: int = 1
  z_loss: float = 0.0
  seed: int = 0
  init_from: str | None = None
  eval_every: int = 500
  mesh: MeshShape = MeshShape()
  zero_stage: Literal[1, 2, 3] = 3
  gradient_sums: Literal["activations", "float32"] = "activations"
  checkpoint: CheckpointConfig = CheckpointConfig()
  metrics: MetricsConfig = MetricsConfig()
  statistics: StatisticsConfig = StatisticsConfig()
  bad_steps: BadStepPolicy = BadStepPolicy()
  watchdog: WatchdogConfig = WatchdogConfig()
  xla_flags: XlaFlags = XlaFlags()

  def __post_init__(self):
    for name in ("batch_size", "total_steps", "num_microbatches", "eval_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"Run: {name} {getattr(self, name)} must be at least 1")
    if self.total_steps >= 2**31:
      raise ValueError(
        f"Run: total_steps {self.total_steps} must be below 2^31, where the step counter ends; "
        "they are optimizer steps, not tokens"
      )
    if self.zero_stage not in (1, 2, 3):
      raise ValueError(f"Run: zero_stage {self.zero_stage} is none of 1, 2, 3")
    if self.gradient_sums not in ("activations", "float32"):
      raise ValueError(
        f"Run: gradient_sums {self.gradient_sums!r} is none of 'activations', 'float32'"
      )
    if not 0 <= self.z_loss < float("inf"):
      raise ValueError(f"Run: z_loss {self.z_loss} must not be negative, and finite")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"Run: seed {self.seed} must be at least 0 and below 2^32")
    if self.batch_size % self.num_microbatches:
      raise ValueError(
        f"Run: batch_size {self.batch_size} is not divisible by num_microbatches "
        f"{self.num_microbatches}"
      )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
  """Path of each field, as it is written in an override, to its value."""
  if dataclasses.is_dataclass(value):
    items = [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
  elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
    items = [(f"[{index}]", item) for index, item in enumerate(value)]
  else:
    return {prefix.removeprefix("."): value}
  flat = {}
  for name, item in items:
    flat.update(flatten(item, prefix + name))
  return flat
