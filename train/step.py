"""One optimizer step and one evaluation step: pure functions, compiled by train/program.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.rows import Batch
from models.decoder import Model
from sharding import logical
from train.loss import LossSums, loss_sums
from train.optimizer import GradientTransformation, apply_updates, clip_factor, global_norm
from train.state import TrainState


class Limits(NamedTuple):
  """Float32 scalars: a step with a loss or a gradient norm above its limit changes nothing."""

  loss: Any
  grad_norm: Any


NO_LIMITS = Limits(np.float32(np.inf), np.float32(np.inf))


class StepMetrics(NamedTuple):
  """What a step reports: float32 scalars on the device, and a norm per parameter for diagnosis."""

  loss: jax.Array  # nats per target, without the z-loss
  z_loss: jax.Array  # mean of log_z^2, before its coefficient
  weight: jax.Array  # targets in the global batch
  grad_norm: jax.Array  # before clipping
  is_applied: jax.Array  # bool; if False the step changed nothing but the step count
  square_norms: Any  # of each gradient's sum over targets: the parameters' tree, one per layer


def train_step(
  state: TrainState,
  batch: Batch,
  limits: Limits,
  *,
  model: Model,
  tx: GradientTransformation,
  num_microbatches: int,
  z_loss: float,
  clip_norm: float | None,
) -> tuple[TrainState, StepMetrics]:
  """The state after one step on `batch`, and what happened.

  Losses and gradients of `num_microbatches` equal parts are summed and divided once by the number
  of targets in the whole batch, so the result is that of one large batch. A loss or gradient that
  is not finite, or above `limits`, leaves parameters and moments as they were.
  """

  def objective(params: Any, part: Batch) -> tuple[jax.Array, LossSums]:
    x_BTD, unembed_VD = model.apply(params, part.tokens_BT, part.segments_BT)
    sums = loss_sums(x_BTD, unembed_VD, part, logit_cap=model.config.logit_cap)
    return sums.loss + z_loss * sums.log_z_squared, sums

  gradient = jax.value_and_grad(objective, has_aux=True)

  if num_microbatches == 1:
    (_, sums), grads = gradient(state.params, batch)
  else:

    def accumulate(carry: Any, part: Batch) -> tuple[Any, None]:
      (_, sums), grads = gradient(state.params, part)
      new = jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, (sums, grads))
      return (new[0], logical.constrain_gradients(new[1], model.axes)), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), state.params)
    start = (
      LossSums(*[jnp.zeros((), jnp.float32)] * 3),
      logical.constrain_gradients(zeros, model.axes),
    )
    (sums, grads), _ = jax.lax.scan(accumulate, start, microbatches(batch, num_microbatches))

  # A batch without any target (all padding) would divide by zero, and has nothing to learn from.
  weight = jnp.maximum(sums.weight, 1.0)
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  grads = logical.constrain_gradients(grads, model.axes)

  # Norms of the sums, not of the means: dividing and clipping are then one factor in the update and
  # no pass of their own. XLA fuses a product into all that reads it, and does not fuse a quotient.
  square_norms = jax.tree.map(square_norm, grads, model.axes)
  grad_norm = global_norm(square_norms) / weight
  loss = sums.loss / weight
  is_finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
  is_applied = is_finite & (loss <= limits.loss) & (grad_norm <= limits.grad_norm)
  factor = clip_factor(grad_norm, clip_norm) / weight
  grads = jax.tree.map(lambda g: g * factor, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = apply_updates(state.params, updates)

  def keep(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(is_applied, new, old)

  new_state = TrainState(
    state.step + 1,
    jax.tree.map(keep, params, state.params),
    jax.tree.map(keep, opt_state, state.opt_state),
  )
  metrics = StepMetrics(
    loss, sums.log_z_squared / weight, sums.weight, grad_norm, is_applied, square_norms
  )
  return new_state, metrics


def eval_step(params: Any, batch: Batch, *, model: Model) -> LossSums:
  """The sums of one held-out batch."""
  x_BTD, unembed_VD = model.apply(params, batch.tokens_BT, batch.segments_BT)
  return loss_sums(x_BTD, unembed_VD, batch, logit_cap=model.config.logit_cap)


def square_norm(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Sum of squares of an array of one parameter's shape and axes, for each stacked layer."""
  num_layer_axes = sum(name == "layers" for name in axes)
  return jnp.sum(jnp.square(x), axis=tuple(range(num_layer_axes, x.ndim)))


def microbatches(batch: Batch, num_microbatches: int) -> Batch:
  """[B, ...] as [k, B / k, ...] with k = num_microbatches; part j has the rows j, j + k, ...

  Every device's rows are distributed evenly over the parts, so no row moves to another device.
  """
  return jax.tree.map(lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
