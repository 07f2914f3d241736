"""How a run lies on a machine, and the layouts we recommend for the published sizes.

A layout changes no result: `layout.of(run)` trains as `run` does. The table was found by
`python -m launch.plan --search` as the best layout that fits all families of a size;
docs/plans.jsonl has what the compiler says of them.
"""

import dataclasses
from typing import Literal

from models.decoder import Remat
from sharding.mesh import MeshShape
from train.config import Run

Stage = Literal[1, 2, 3]
STAGES: tuple[Stage, ...] = (1, 2, 3)
REMATS: tuple[Remat, ...] = ("none", "matmuls", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """What is free to choose for a given run and machine."""

  mesh: MeshShape
  zero_stage: Stage = 3
  remat: Remat = "block"
  num_microbatches: int = 1

  def of(self, run: Run) -> Run:
    """`run` in this layout; ValueError as Run raises it."""
    return dataclasses.replace(
      run,
      mesh=self.mesh,
      zero_stage=self.zero_stage,
      num_microbatches=self.num_microbatches,
      model=dataclasses.replace(run.model, remat=self.remat),
    )


def layout_of(run: Run, num_devices: int) -> Layout:
  """The layout that a run has on so many devices."""
  return Layout(
    mesh=run.mesh.resolved(num_devices),
    zero_stage=run.zero_stage,
    remat=run.model.remat,
    num_microbatches=run.num_microbatches,
  )


def _layout(
  fsdp: int,
  tensor: int,
  zero_stage: Stage,
  remat: Remat,
  parts: int,
  *,
  data: int = 1,
  sequence: int = 1,
) -> Layout:
  return Layout(
    mesh=MeshShape(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor),
    zero_stage=zero_stage,
    remat=remat,
    num_microbatches=parts,
  )


# Families whose presets of a size have the same layout.
_FAMILIES = ("griffin", "hawk", "transformer", "recurrentgemma")
# By chips and size, or a preset's whole name: fsdp, tensor, ZeRO stage, remat, microbatches.
RECOMMENDED: dict[str, dict[str, Layout]] = {
  "v5e-256": {
    "100m": _layout(128, 2, 3, "none", 1),
    "200m": _layout(128, 2, 3, "none", 1),
    "400m": _layout(64, 1, 3, "none", 1, data=4),
    "1b": _layout(256, 1, 3, "none", 1),
    "3b": _layout(128, 1, 3, "none", 1, data=2),
    "7b": _layout(256, 1, 3, "block", 1),
    "14b": _layout(128, 1, 3, "block", 2, data=2),
    "2b": _layout(16, 2, 3, "none", 1, data=8),
    "9b": _layout(128, 2, 3, "block", 2),
    "long-row-1b": _layout(4, 1, 3, "block", 1, sequence=64),
  },
  "v5p-128": {
    "100m": _layout(128, 1, 3, "none", 1),
    "200m": _layout(128, 1, 3, "none", 1),
    "400m": _layout(128, 1, 3, "none", 1),
    "1b": _layout(128, 1, 3, "none", 1),
    "3b": _layout(128, 1, 3, "none", 1),
    "7b": _layout(128, 1, 3, "matmuls", 1),
    "14b": _layout(128, 1, 3, "matmuls", 2),
    "2b": _layout(128, 1, 3, "none", 1),
    "9b": _layout(128, 1, 3, "none", 2),
    "long-row-1b": _layout(4, 1, 3, "block", 1, sequence=32),
  },
  "h100-8": {
    "100m": _layout(8, 1, 3, "none", 1),
    "200m": _layout(8, 1, 3, "none", 1),
    "400m": _layout(8, 1, 3, "matmuls", 1),
    "1b": _layout(8, 1, 2, "matmuls", 4),
    "3b": _layout(8, 1, 2, "matmuls", 8),
    "7b": _layout(8, 1, 3, "matmuls", 32),
    "14b": _layout(8, 1, 3, "matmuls", 64),
    "2b": _layout(8, 1, 2, "none", 8),
    "9b": _layout(8, 1, 3, "matmuls", 32),
    "long-row-1b": _layout(1, 1, 1, "block", 4, sequence=8),
  },
}


def recommended(run: Run, *, chip: str, num_chips: int) -> Layout | None:
  """The layout of the table for a preset on `num_chips` chips; None where it has none."""
  family, _, size = run.name.rpartition("-")
  key = size if family in _FAMILIES else run.name
  return RECOMMENDED.get(f"{chip}-{num_chips}", {}).get(key)
