"""The run of tests/tiny.py as a config file: `--config=tests/tiny_config.py:FOLDER`."""

import dataclasses
import pathlib

from tests import tiny
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import Run


def get_config(folder: str) -> Run:
  """60 steps of one recurrent block, on a store in `folder`, saving nearly always."""
  run = tiny.run(pathlib.Path(folder))
  return dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, num_blocks=1),
    data=dataclasses.replace(run.data, eval_source=None),
    total_steps=60,
    checkpoint=CheckpointConfig(every_steps=20, temporary_minutes=0.05 / 60),
  )
