"""Rotary position embedding (arXiv:2104.09864) on the first half of each head.

The first H/2 dimensions are rotated and the rest pass through, as RecurrentGemma has it; inside the
rotated part of size P, dimension i is paired with i + P/2 and turns at 10000^(-2i/P) per token.
"""

import jax
import jax.numpy as jnp

_MAX_WAVELENGTH = 10_000.0


def apply_rope(x_BTNH: jax.Array, position_BT: jax.Array) -> jax.Array:
  """x rotated by the token's position in its document; angles in float32, result in x's dtype."""
  rotated_size = x_BTNH.shape[-1] // 2
  half = rotated_size // 2
  frequency_P = _MAX_WAVELENGTH ** (-2.0 * jnp.arange(half, dtype=jnp.float32) / rotated_size)
  angle_BT1P = position_BT[:, :, None, None].astype(jnp.float32) * frequency_P
  sin_BT1P, cos_BT1P = jnp.sin(angle_BT1P), jnp.cos(angle_BT1P)
  first_BTNP, second_BTNP, rest_BTNI = jnp.split(x_BTNH, (half, rotated_size), axis=-1)
  turned_first_BTNP = first_BTNP * cos_BT1P - second_BTNP * sin_BT1P
  turned_second_BTNP = second_BTNP * cos_BT1P + first_BTNP * sin_BT1P
  turned_BTNH = [turned_first_BTNP.astype(x_BTNH.dtype), turned_second_BTNP.astype(x_BTNH.dtype)]
  return jnp.concatenate([*turned_BTNH, rest_BTNI], axis=-1)
