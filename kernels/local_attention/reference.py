"""Attention as its definition reads: every query against every key, and a mask."""

import jax
import jax.numpy as jnp


def attention(
  q_BTNH: jax.Array,
  k_BSEH: jax.Array,
  v_BSEH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """softmax(q k^T / sqrt(H) where visible) v, in float32; the result in q's dtype."""
  batch, time, heads, head_size = q_BTNH.shape
  keys, kv_heads = k_BSEH.shape[1:3]
  q_BTEQH = q_BTNH.reshape(batch, time, kv_heads, heads // kv_heads, head_size)
  distance_TS = (keys - time + jnp.arange(time))[:, None] - jnp.arange(keys)[None]
  visible_TS = distance_TS >= 0
  if window is not None:
    visible_TS &= distance_TS <= window
  visible_BTS = visible_TS & (q_documents_BT[:, :, None] == k_documents_BS[:, None])
  visible_BT11S = visible_BTS[:, :, None, None]
  logits_BTEQS = jnp.einsum(
    "BTEQH,BSEH->BTEQS", q_BTEQH, k_BSEH, preferred_element_type=jnp.float32
  )
  logits_BTEQS = jnp.where(visible_BT11S, logits_BTEQS * head_size**-0.5, -jnp.inf)
  weights_BTEQS = jax.nn.softmax(logits_BTEQS, axis=-1)
  o_BTEQH = jnp.einsum("BTEQS,BSEH->BTEQH", weights_BTEQS, v_BSEH.astype(jnp.float32))
  return o_BTEQH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
