"""One input through two or more matrices at once: the projections that begin every sub-layer."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def project(x_BTD: jax.Array, w_DKF: jax.Array) -> jax.Array:
  """y_BTKF = x_BTD @ w_DKF, in the dtype that both have; "projection" to a remat policy.

  The gradient of w is x^T dy. JAX's own is (dy^T x)^T; a CPU writes out the transpose of the first
  operand, and dy is two to six times x.
  """
  # A policy that keeps products does not see into a function with its own gradient.
  return checkpoint_name(_product(x_BTD, w_DKF), "projection")


def branches(x_BTD: jax.Array, w_DKF: jax.Array, b_KF: jax.Array) -> tuple[jax.Array, ...]:
  """For every k, y_BTF = x_BTD @ w_DKF[:, k] + b_KF[k]; "projection" to a remat policy.

  As many products as branches, each with its bias: of one product a TPU writes the result with and
  without bias, cuts the branches out of it, and joins their gradients again for every product of
  the backward pass (docs/benchmarks.md).
  """
  return tuple(
    checkpoint_name(_product(x_BTD, w_DKF[:, k : k + 1])[:, :, 0] + b_F, "projection")
    for k, b_F in enumerate(b_KF)
  )


@jax.custom_vjp
def _product(x_BTD: jax.Array, w_DKF: jax.Array) -> jax.Array:
  return jnp.einsum("BTD,DKF->BTKF", x_BTD, w_DKF)


def _forward(x_BTD: jax.Array, w_DKF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _product(x_BTD, w_DKF), (x_BTD, w_DKF)


def _backward(
  residuals: tuple[jax.Array, jax.Array], dy_BTKF: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x_BTD, w_DKF = residuals
  dx_BTD = jnp.einsum("BTKF,DKF->BTD", dy_BTKF, w_DKF)
  # jnp.einsum would put dy first again.
  dw_DKF = jax.lax.dot_general(x_BTD, dy_BTKF, (((0, 1), (0, 1)), ((), ())))
  return dx_BTD, dw_DKF


_product.defvjp(_forward, _backward)
