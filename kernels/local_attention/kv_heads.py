"""Several key-value heads, by an attention that knows one."""

from collections.abc import Callable

import jax


def attend_each(
  attend: Callable[..., jax.Array],
  q_BTNH: jax.Array,
  k_BSEH: jax.Array,
  v_BSEH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
) -> jax.Array:
  """o_BTNH: each key-value head attended to by its own N / E query heads.

  `attend(q_BTQH, k_BSH, v_BSH, q_documents_BT, k_documents_BS) -> o_BTQH` has one key-value head.
  One alone is passed to it as it is, without a batch dimension.
  """
  batch, time, heads, head_size = q_BTNH.shape
  kv_heads = k_BSEH.shape[2]
  if kv_heads == 1:
    return attend(q_BTNH, k_BSEH.squeeze(2), v_BSEH.squeeze(2), q_documents_BT, k_documents_BS)
  q_BTEQH = q_BTNH.reshape(batch, time, kv_heads, heads // kv_heads, head_size)
  over_heads = jax.vmap(attend, in_axes=(2, 2, 2, None, None), out_axes=2)
  return over_heads(q_BTEQH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS).reshape(q_BTNH.shape)
