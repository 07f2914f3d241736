"""The parameters that a run has come to, for commands that use them."""

from typing import Any

from train import program as programs
from train.checkpoint.reading import restore
from train.checkpoint.storage import steps
from train.config import Run
from train.program import Program
from train.record import compare_records, run_record


def newest(run: Run, workdir: str) -> tuple[Program, int, Any]:
  """The run laid out on the devices at hand, the step of its newest checkpoint in the folder or URL
  `workdir`, and the parameters of that step, without its moments; ValueError without a checkpoint
  of this model."""
  folder = f"{workdir.rstrip('/')}/checkpoints"
  complete = steps(folder)
  if not complete:
    raise ValueError(f"{folder} has no checkpoint; train first")
  program = programs.build(run)
  restored = restore(folder, max(complete), program.abstract.params, part="params")
  # Arrays of one shape can be of models that compute another thing with them.
  compare_records(_of_model(restored.record), _of_model(run_record(run, program.model)))
  return program, restored.step, restored.state


def _of_model(record: dict[str, Any]) -> dict[str, Any]:
  of_model = {
    path: value for path, value in record["identity"].items() if path.startswith("model.")
  }
  return {**record, "identity": of_model}
