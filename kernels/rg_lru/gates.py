"""The input of the recurrence and its decay, from the gates' pre-activations, in float32."""

import jax
import jax.numpy as jnp

C = 8.0
# Where 1 - a^2 is below this, the square root's derivative is limited to 1000 (arXiv:2404.07839).
LEAST_ONE_MINUS_A2 = 1.0 / (4.0 * 1000.0**2)


def gated_input(
  x_BTR: jax.Array,
  r_BTR: jax.Array,
  i_BTR: jax.Array,
  decay_R: jax.Array,
  is_start_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The input of the recurrence (in x's dtype) and its decay a (float32)."""
  # Float32 from here: in bfloat16 a decay of 0.999 rounds to 1 and never forgets.
  open_BTR = jax.nn.sigmoid(i_BTR.astype(jnp.float32))
  start_BT1 = is_start_BT[..., None]
  # One expm1 gives both without cancellation: a = 1 + e and 1 - a^2 = -e (2 + e).
  e_BTR = _decay_minus_1(r_BTR, decay_R)
  a_BTR = jnp.where(start_BT1, 0.0, 1.0 + e_BTR)
  scale_BTR = jnp.where(start_BT1, 1.0, bounded_sqrt(-e_BTR * (2.0 + e_BTR)))
  in_BTR = scale_BTR * open_BTR * x_BTR.astype(jnp.float32)
  return in_BTR.astype(x_BTR.dtype), a_BTR


def product_of_decays(r_BTR: jax.Array, decay_R: jax.Array, is_start_BT: jax.Array) -> jax.Array:
  """The product of all a_t of a row, float32 [batch, R]; exactly 0 where a document starts."""
  a_BTR = jnp.where(is_start_BT[..., None], 0.0, 1.0 + _decay_minus_1(r_BTR, decay_R))
  return jnp.prod(a_BTR, axis=1)


def _decay_minus_1(r_BTR: jax.Array, decay_R: jax.Array) -> jax.Array:
  r_BTR = jax.nn.sigmoid(r_BTR.astype(jnp.float32))
  return jnp.expm1(-C * r_BTR * jax.nn.softplus(decay_R.astype(jnp.float32)))


@jax.custom_jvp
def bounded_sqrt(z_BTR: jax.Array) -> jax.Array:
  """sqrt(z) with a derivative of at most 1000; the true one is infinite at z = 0."""
  return jnp.sqrt(z_BTR)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
  (z_BTR,), (dz_BTR,) = primals, tangents
  slope_BTR = 0.5 * jax.lax.rsqrt(jnp.maximum(z_BTR, LEAST_ONE_MINUS_A2))
  return jnp.sqrt(z_BTR), slope_BTR * dz_BTR
