"""Attention as its definition reads: every query against every key, and a mask."""

import jax
import jax.numpy as jnp


def attention(
  q_BTNH: jax.Array,
  k_BSH: jax.Array,
  v_BSH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """softmax(q k^T / sqrt(H) where visible) v, in float32; the result in q's dtype."""
  time, keys, head_size = q_BTNH.shape[1], k_BSH.shape[1], q_BTNH.shape[3]
  distance_TS = (keys - time + jnp.arange(time))[:, None] - jnp.arange(keys)[None]
  visible_TS = distance_TS >= 0
  if window is not None:
    visible_TS &= distance_TS <= window
  visible_BTS = visible_TS & (q_documents_BT[:, :, None] == k_documents_BS[:, None])
  logits_BTNS = jnp.einsum("BTNH,BSH->BTNS", q_BTNH, k_BSH, preferred_element_type=jnp.float32)
  logits_BTNS = jnp.where(visible_BTS[:, :, None], logits_BTNS * head_size**-0.5, -jnp.inf)
  weights_BTNS = jax.nn.softmax(logits_BTNS, axis=-1)
  o_BTNH = jnp.einsum("BTNS,BSH->BTNH", weights_BTNS, v_BSH.astype(jnp.float32))
  return o_BTNH.astype(q_BTNH.dtype)
