"""Next-token loss as sums and weights, divided once by the global weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data.rows import Batch
from kernels.cross_entropy import log_z_and_target_logit
from sharding import logical


class LossSums(NamedTuple):
  """Sums over weighted targets, float32 scalars; divide by `weight` for means."""

  loss: jax.Array  # negative log-likelihood, nats
  log_z_squared: jax.Array
  weight: jax.Array  # the number of targets that count


def loss_sums(
  x_BTD: jax.Array, unembed_VD: jax.Array, batch: Batch, *, logit_cap: float | None
) -> LossSums:
  """The sums of one batch. Logits exist a chunk at a time, and are not gathered over shards."""
  with jax.named_scope("loss"):
    log_z_BT, target_logit_BT = _log_z_and_target_logit(x_BTD, unembed_VD, batch, logit_cap)
    weights_BT = batch.weights_BT
    return LossSums(
      jnp.sum(weights_BT * (log_z_BT - target_logit_BT)),
      jnp.sum(weights_BT * jnp.square(log_z_BT)),
      jnp.sum(weights_BT),
    )


def row_losses(
  x_BTD: jax.Array, unembed_VD: jax.Array, batch: Batch, *, logit_cap: float | None
) -> jax.Array:
  """[B] mean loss of each row in nats per target, NaN for a row without targets."""
  log_z_BT, target_logit_BT = _log_z_and_target_logit(x_BTD, unembed_VD, batch, logit_cap)
  weights_BT = batch.weights_BT
  return jnp.sum(weights_BT * (log_z_BT - target_logit_BT), axis=1) / jnp.sum(weights_BT, axis=1)


def _log_z_and_target_logit(
  x_BTD: jax.Array, unembed_VD: jax.Array, batch: Batch, logit_cap: float | None
) -> tuple[jax.Array, jax.Array]:
  def on_shard(x_BTD, unembed_VD, targets_BT):
    return log_z_and_target_logit(
      x_BTD,
      unembed_VD,
      targets_BT,
      logit_cap=logit_cap,
      axis_name=logical.mesh_axis("vocab"),
    )

  return logical.on_shards(
    on_shard,
    in_axes=(("batch", "time", "width"), ("vocab", None), ("batch", "time")),
    out_axes=(("batch", "time"), ("batch", "time")),
  )(x_BTD, unembed_VD, batch.targets_BT)
