"""The state before the first step: drawn at random, or with the parameters of a directory."""

import jax
import numpy as np
from absl import logging

from models.decoder import DecoderConfig
from models.huggingface import directory
from models.same_model import differences
from train import program as programs
from train.program import Program
from train.state import TrainState


def initial_state(program: Program) -> TrainState:
  """Step 0 of a run, in its layout, with moments of 0. With `init_from` every process reads that
  directory; ValueError where it holds another model than the run's."""
  run = program.run
  if run.init_from is None:
    return programs.initialize(program)
  # First: to compile and draw the rest takes minutes, and this may be refused.
  config, params = directory.load(run.init_from, param_dtype=run.model.param_dtype)
  _check_same(run.model, config, run.init_from)
  state = programs.initialize(program)
  logging.info("parameters from %s", run.init_from)
  return state._replace(params=jax.tree.map(_laid_out, params, program.shardings.params))


def _check_same(ours: DecoderConfig, theirs: DecoderConfig, place: str) -> None:
  different = [
    f"{path} is {there!r} there, {here!r} in the config"
    for path, there, here in differences(theirs, ours)
  ]
  if different:
    raise ValueError(
      f"init_from {place} is of another model: {'; '.join(different)}. Set --config.model to "
      "what is there, or give another directory"
    )


def _laid_out(w: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """An array that every process has, each device's part on that device."""
  return jax.make_array_from_callback(w.shape, sharding, lambda index: w[index])
