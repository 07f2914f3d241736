"""The matrix products of the layers: rows of activations by weights of two or more dimensions.

XLA's products for CPUs take matrices as they lie, forward and backward, and have a transposed copy
made of anything else. So where arrays are whole, these are products of matrices; where arrays are
split over devices they are not, since split dimensions cannot be merged where they lie.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sharding import logical


def project(x_BTI: jax.Array, w_IO: jax.Array, *, inputs: int = 1) -> jax.Array:
  """y_BTO = x_BTI @ w_IO, summed over the first `inputs` dimensions of w, in the dtype of both.

  I and O each stand for one or more dimensions: [B, T, D] with [D, 2, F] gives [B, T, 2, F], and
  [B, T, N, H] with [N, H, D] and inputs=2 gives [B, T, D].
  """
  if logical.is_split():
    return jnp.tensordot(x_BTI, w_IO, inputs)
  size = math.prod(w_IO.shape[:inputs])
  y_RO = x_BTI.reshape(-1, size) @ w_IO.reshape(size, -1)
  return y_RO.reshape(*x_BTI.shape[:2], *w_IO.shape[inputs:])


def branches(x_BTD: jax.Array, w_DKF: jax.Array, b_KF: jax.Array) -> tuple[jax.Array, ...]:
  """For every k, y_BTF = x_BTD @ w_DKF[:, k] + b_KF[k]; "projection" to a remat policy.

  As many products as branches, each with its bias: of one product a TPU writes the result with and
  without bias, cuts the branches out of it, and joins their gradients again for every product of
  the backward pass (docs/benchmarks.md).
  """
  return tuple(
    checkpoint_name(project(x_BTD, w_DKF[:, k]) + b_F, "projection") for k, b_F in enumerate(b_KF)
  )
