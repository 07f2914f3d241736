"""The state before the first step: drawn at random, or with the parameters of a directory."""

import fnmatch
from typing import Any

import jax
import numpy as np
from absl import logging

from models import kernel_fields
from models.decoder import DecoderConfig
from models.huggingface import directory
from train import program as programs
from train.config import flatten
from train.program import Program
from train.state import TrainState

# What of a model's config its parameters do not depend on, beside kernels.
_FREE = ("dtype", "param_dtype", "remat", "layers", "*.decay_init")


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
  here, there = _decisive(ours), _decisive(theirs)
  missing = "(not there)"
  different = [
    f"{path} is {there.get(path, missing)!r} there, {here.get(path, missing)!r} in the config"
    for path in sorted({*here, *there})
    if here.get(path, missing) != there.get(path, missing)
  ]
  if different:
    raise ValueError(
      f"init_from {place} is of another model: {'; '.join(different)}. Set --config.model to "
      "what is there, or give another directory"
    )


def _decisive(config: DecoderConfig) -> dict[str, Any]:
  return {
    path: value
    for path, value in flatten(kernel_fields.without_kernels(config)).items()
    if not any(fnmatch.fnmatchcase(path, pattern) for pattern in _FREE)
  }


def _laid_out(w: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """An array that every process has, each device's part on that device."""
  return jax.make_array_from_callback(w.shape, sharding, lambda index: w[index])
