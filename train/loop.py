"""`fit`: the whole of training, top to bottom. Start reading here.

Every step is dispatched before the one before it is read: the host never makes the device wait.
"""

import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from absl import logging

from data import pipeline
from data.rows import Batch
from models import decoder
from models.flops import count_params, flops_per_token
from sharding import logical, topology
from sharding.mesh import make_mesh
from train import faults, record, state, step
from train.checkpoint import Checkpoints
from train.config import Run, placement_rules
from train.evaluate import Evaluation, evaluate
from train.metrics import Metrics, Throughput, mfu, plot_losses
from train.optimizer import decay_mask

Outcome = Literal["complete", "stopped"]


def fit(run: Run, workdir: pathlib.Path) -> Outcome:
  """Trains `run` in `workdir`, from its newest checkpoint if there is one.

  "complete" after the last step; "stopped" when a signal asked to leave, with everything saved.
  Raises faults.NonFiniteError, and ValueError for what a user can set right.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  mesh = make_mesh(run.mesh)
  rules = placement_rules(run, mesh)
  model = decoder.build(run.model)
  tx = run.optimizer.build(total_steps=run.total_steps, decay_mask=decay_mask(model.axes))
  logging.info("mesh %s, %s parameters", dict(mesh.shape), f"{count_params(run.model).total:,}")

  with (
    logical.placement(mesh, rules),
    Checkpoints(workdir / "checkpoints", run.checkpoint) as checkpoints,
    faults.StopRequest() as stop,
  ):
    shardings = state.state_shardings(model, tx, mesh=mesh, rules=rules)
    now = record.run_record(run, model)
    train_state = _restore_or_init(run, checkpoints, model, tx, shardings, now)
    start = int(train_state.step)
    if start >= run.total_steps:
      logging.info("the run is complete: step %d of %d", start, run.total_steps)
      return "complete"

    compiled = _compile(run, model, tx, mesh, shardings)
    with Metrics(workdir, run.metrics, run=run, start_step=start) as metrics:
      loop = _Loop(run, workdir, mesh, model, compiled, checkpoints, metrics, now)
      return loop.run_from(train_state, start, stop)
