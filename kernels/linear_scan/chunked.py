"""Chunks of a row in parallel: the effect of each on a state, the states between, then all states.

Letters of this file: N chunks of a row, C steps of a chunk. A chunk takes the state s before it to
l + p s: l is its last state from zero, p the product of its decays. The first pass computes only l
and p. The second starts every chunk from its own s and steps as the definition does. A decay of 0
makes p exactly 0.
"""

import math

import jax
import jax.numpy as jnp


def scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t in float32; states in x's dtype, the last one float32."""
  batch, time, width = x_BTD.shape
  # 2 C steps inside the chunks and T / C across them: fewest together near sqrt(T).
  chunk = min(time, max(8, 1 << round(math.log2(math.sqrt(time)))))
  num_chunks = -(-time // chunk)
  fill = num_chunks * chunk - time
  padding = ((0, 0), (fill, 0) if reverse else (0, fill), (0, 0))

  def steps_first(z_BTD: jax.Array, fill_value: int) -> jax.Array:
    z_BTD_padded = jnp.pad(z_BTD, padding, constant_values=fill_value)
    return jnp.moveaxis(z_BTD_padded.reshape(batch, num_chunks, chunk, width), 2, 0)

  # Padding of the last chunk only passes the state on: a = 1 and x = 0.
  inputs_CBND = (steps_first(x_BTD, 0), steps_first(a_BTD, 1))

  def inside(carry, inputs):
    local_BND, product_BND = carry
    x_BND, a_BND = (z_BND.astype(jnp.float32) for z_BND in inputs)
    return (a_BND * local_BND + x_BND, a_BND * product_BND), None

  # Made from h0, to vary over the same mesh axes (jax.shard_map).
  zeros_BND = jnp.broadcast_to(jnp.zeros_like(h0_BD)[:, None], (batch, num_chunks, width))
  (local_BND, product_BND), _ = jax.lax.scan(
    inside, (zeros_BND, jnp.ones_like(zeros_BND)), inputs_CBND, reverse=reverse
  )

  def across(h_BD, inputs):
    local_BD, product_BD = inputs
    return product_BD * h_BD + local_BD, h_BD

  _, before_NBD = jax.lax.scan(
    across, h0_BD, (local_BND.swapaxes(0, 1), product_BND.swapaxes(0, 1)), reverse=reverse
  )

  def step(h_BND, inputs):
    x_BND, a_BND = (z_BND.astype(jnp.float32) for z_BND in inputs)
    h_BND = a_BND * h_BND + x_BND
    return h_BND, h_BND

  # Collected in float32 and rounded once, as in reference.py.
  last_BND, h_CBND = jax.lax.scan(step, before_NBD.swapaxes(0, 1), inputs_CBND, reverse=reverse)
  y_BTD = jnp.moveaxis(h_CBND, 0, 2).reshape(batch, -1, width).astype(x_BTD.dtype)
  first = padding[1][0]
  return y_BTD[:, first : first + time], last_BND[:, 0 if reverse else -1]
