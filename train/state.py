"""What training carries from step to step, and how each array is laid out."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from models.decoder import Model
from sharding import logical
from sharding.logical import Rules
from train.optimizer import AdamWState, GradientTransformation


class TrainState(NamedTuple):
  """`step` counts finished optimizer steps, so it is also the data position: batches consumed,
  not counting those that are passed over."""

  step: jax.Array
  params: Any
  opt_state: Any


def init_state(key: jax.Array, *, model: Model, tx: GradientTransformation) -> TrainState:
  """Fresh parameters and moments; jit it with `state_shardings`, or one device holds them all."""
  params = model.init(key)
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(model: Model, tx: GradientTransformation) -> TrainState:
  """Shapes and dtypes of the state; nothing is allocated, and the model is not built again."""
  moments = jax.eval_shape(tx.init, model.shapes)
  step = cast(Any, jax.ShapeDtypeStruct((), jnp.int32))
  return TrainState(step, model.shapes, moments)


def state_shardings(model: Model, *, mesh: jax.sharding.Mesh, rules: Rules) -> TrainState:
  """The sharding of every array of the state on `mesh`; moments are laid out by `rules.moments`."""
  params = logical.shardings(model.axes, model.shapes, rules.parameters, mesh)
  moments = logical.shardings(model.axes, model.shapes, rules.moments, mesh)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  # A state of shardings instead of arrays.
  optimizer: Any = AdamWState(cast(Any, replicated), mu=moments, nu=moments)
  return TrainState(cast(Any, replicated), params, optimizer)
