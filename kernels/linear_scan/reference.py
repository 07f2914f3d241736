"""One step at a time: slow and obviously right on an accelerator, and the fastest on a CPU."""

import jax
import jax.numpy as jnp


def scan(
  x_BTD: jax.Array, a_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """h_t = a_t h_{t-1} + x_t with a float32 carry; states in x's dtype, the last one float32."""

  def step(h_BD, inputs):
    x_BD, a_BD = inputs
    h_BD = a_BD.astype(jnp.float32) * h_BD + x_BD.astype(jnp.float32)
    return h_BD, h_BD

  # Collected in float32 and rounded once: to write a row of a bfloat16 array, XLA on CPU widens and
  # narrows all of it, so that collecting bfloat16 states takes time quadratic in T.
  h_BD, h_TBD = jax.lax.scan(
    step, h0_BD, (x_BTD.swapaxes(0, 1), a_BTD.swapaxes(0, 1)), reverse=reverse
  )
  return h_TBD.swapaxes(0, 1).astype(x_BTD.dtype), h_BD
