"""Root-mean-square normalisation (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.param import param, zeros

_EPSILON = 1e-6


class RMSNorm(nnx.Module):
  """x / rms(x) * (1 + scale): statistics in float32, the result in the dtype of x."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.scale_D = param(zeros, (width,), ("norm",), float32=True, decays=False, rngs=rngs)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    # Float32: a mean of squares over thousands of channels has no bits to spare in bfloat16.
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_rms_BT1 = jax.lax.rsqrt(
      jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + _EPSILON
    )
    scale_D = 1.0 + self.scale_D[...].astype(jnp.float32)
    return (x32_BTD * inverse_rms_BT1 * scale_D).astype(x_BTD.dtype)
