"""Chunks of a row in parallel, each from a zero state, then the states that they hand on.

Within chunk n, h_t = l_t + p_t s_n: l the states from zero, p the running product of decays, s_n
the last state of the chunk before. A decay of 0 makes p exactly 0 from there on.
"""

import math

import jax
import jax.numpy as jnp


def scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t in float32; states in x's dtype, the last one float32."""
  batch, time, width = x_BTD.shape
  # C steps inside a chunk and T / C across chunks: fewest together at sqrt(T).
  chunk = min(time, max(8, 1 << round(math.log2(max(1.0, math.sqrt(time))))))
  num_chunks = -(-time // chunk)
  padding = ((0, 0), (0, num_chunks * chunk - time), (0, 0))
  if reverse:
    padding = ((0, 0), padding[1][::-1], (0, 0))
  # Steps that only carry the state on: a = 1 and x = 0.
  x_BTD_padded = jnp.pad(x_BTD, padding)
  a_BTD_padded = jnp.pad(a_BTD, padding, constant_values=1)

  def chunks_first(z_BTD: jax.Array) -> jax.Array:
    return jnp.moveaxis(z_BTD.reshape(batch, num_chunks, chunk, width), 2, 0)

  def inside(carry, inputs):
    local_BND, product_BND = carry
    x_BND, a_BND = inputs
    a_BND = a_BND.astype(jnp.float32)
    carry = (a_BND * local_BND + x_BND.astype(jnp.float32), a_BND * product_BND)
    return carry, carry

  zeros_BND = jnp.zeros((batch, num_chunks, width), jnp.float32)
  (local_BND, product_BND), (local_CBND, product_CBND) = jax.lax.scan(
    inside,
    (zeros_BND, jnp.ones_like(zeros_BND)),
    (chunks_first(x_BTD_padded), chunks_first(a_BTD_padded)),
    reverse=reverse,
  )

  def across(h_BD, inputs):
    local_BD, product_BD = inputs
    return product_BD * h_BD + local_BD, h_BD

  hT_BD, before_NBD = jax.lax.scan(
    across, h0_BD, (local_BND.swapaxes(0, 1), product_BND.swapaxes(0, 1)), reverse=reverse
  )
  h_CBND = local_CBND + product_CBND * before_NBD.swapaxes(0, 1)
  y_BTD = jnp.moveaxis(h_CBND.astype(x_BTD.dtype), 0, 2).reshape(batch, -1, width)
  first = padding[1][0]
  return y_BTD[:, first : first + time], hT_BD
