"""A tree of combinations: (a, x) then (a', x') is (a a', a' x + x')."""

import jax
import jax.numpy as jnp


def scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t in float32; states in x's dtype, the last one float32."""

  def combine(left, right):
    left_a, left_x = left
    right_a, right_x = right
    return left_a * right_a, right_a * left_x + right_x

  pairs = (a_BTD.astype(jnp.float32), x_BTD.astype(jnp.float32))
  product_BTD, h_BTD = jax.lax.associative_scan(combine, pairs, axis=1, reverse=reverse)
  h_BTD += product_BTD * h0_BD[:, None]
  return h_BTD.astype(x_BTD.dtype), h_BTD[:, 0 if reverse else -1]
