"""Writes tests/golden/old_run.tar.xz: a run of an older commit, up to its first checkpoint.

  git worktree add ../old 5ac03c1
  (cd ../old && PYTHONPATH=. python .../tests/golden/make_old_run.py .../tests/golden)

It holds the token stores `train` and `eval`, the folder `run` with the checkpoint of step 2, and
losses.json: step -> the losses that the old commit went on to compute, on the 8 devices that
tests/conftest.py asks for too. Not to be made again when the code changes: it is there to show
that a run of then goes on.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile

if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from data.pipeline import DataConfig
from models.griffin import griffin
from sharding.mesh import MeshShape
from tests import tiny
from train import loop
from train.config import Run
from train.optimizer import AdamW

SAVED, LAST = 2, 4


def run(folder: pathlib.Path) -> Run:
  """A Griffin with a group and a remainder, on the stores in `folder`."""
  model = griffin(
    vocab_size=256,
    width=8,
    rnn_width=16,
    num_blocks=4,
    num_heads=2,
    head_size=4,
    window=5,
    mlp_width=16,
    dtype="float32",
    remat="none",
  )
  data = DataConfig(
    sources=((str(folder / "train"), 1.0),),
    eval_source=str(folder / "eval"),
    eval_rows=8,
    row_length=16,
  )
  run = tiny.run(
    folder,
    model=model,
    data=data,
    optimizer=AdamW(peak_lr=1e-2, warmup_steps=2),
    batch_size=8,
    total_steps=LAST,
    eval_every=SAVED,
    mesh=MeshShape(fsdp=8),
  )
  return dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, every_steps=SAVED))


def losses(workdir: pathlib.Path) -> dict[str, float]:
  """ "3 train" -> loss, of every step behind the checkpoint."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {
    f"{record['step']} {kind}": record[f"{kind}/loss"]
    for record in map(json.loads, lines)
    for kind in ("train", "eval")
    if record["step"] > SAVED and f"{kind}/loss" in record
  }


def main(output: pathlib.Path) -> None:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    assert loop.fit(run(folder), folder / "whole") == "complete"
    (folder / "losses.json").write_text(json.dumps(losses(folder / "whole"), indent=1) + "\n")
    step = pathlib.Path("checkpoints") / f"{SAVED:08d}"
    shutil.copytree(folder / "whole" / step, folder / "run" / step)
    with tarfile.open(output / "old_run.tar.xz", "w:xz") as tar:
      for part in ("train", "eval", "run", "losses.json"):
        tar.add(folder / part, arcname=part)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
