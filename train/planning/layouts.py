"""How a run lies on a machine, and the layouts we recommend for the published sizes.

A layout changes no result: `layout.of(run)` trains as `run` does. What is recommended is data,
recommended.jsonl: found by `python -m launch.plan --search` as the best layout that fits all
families of a size. docs/plans.jsonl has what the compiler says of them.
"""

import dataclasses
import functools
import json
import pathlib
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


# A line for each machine ("v5e-256": chip and number) and layout, with the names of its runs.
_FILE = pathlib.Path(__file__).with_name("recommended.jsonl")


def recommended(run: Run, *, chip: str, num_chips: int) -> Layout | None:
  """What the file recommends for a run of this name on `num_chips` chips; None for others."""
  return recommendations().get(f"{chip}-{num_chips}", {}).get(run.name)


@functools.cache
def recommendations() -> dict[str, dict[str, Layout]]:
  """Every layout of the file, by machine and name of the run."""
  found: dict[str, dict[str, Layout]] = {}
  for line in map(json.loads, _FILE.read_text(encoding="utf-8").splitlines()):
    layout = Layout(
      mesh=MeshShape(**line["mesh"]),
      zero_stage=line["zero_stage"],
      remat=line["remat"],
      num_microbatches=line["num_microbatches"],
    )
    for name in line["runs"]:
      on_machine = found.setdefault(line["machine"], {})
      if name in on_machine:
        raise ValueError(f"{_FILE.name}: {name} on {line['machine']} has two layouts; keep one")
      on_machine[name] = layout
  return found
