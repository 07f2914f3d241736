"""Attention in blocks of queries, each against the band of keys that it can reach.

Letters of this file: U blocks of a row, C queries of a block, M keys of a band.
"""

import functools

import jax
import jax.numpy as jnp

_NO_DOCUMENT = -(2**31) + 1
# Finite, so that a padded query that sees nothing has weights and no NaN; exp of it is exactly 0.
_HIDDEN = -1e30
# The largest block of queries: a band is window + block keys long, of which window + 1 count.
_MAX_BLOCK = 128


def attention(
  q_BTNH: jax.Array,
  k_BSH: jax.Array,
  v_BSH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """As kernels/local_attention says; no array has T x S elements when S > window + block."""
  arrays = (q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS)
  if window is None or window >= k_BSH.shape[1]:
    return _global(*arrays)
  return jax.checkpoint(functools.partial(_local, window=window), prevent_cse=False)(*arrays)


def _local(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, *, window):
  time, keys = q_BTNH.shape[1], k_BSH.shape[1]
  block = min(_MAX_BLOCK, max(16, window // 4))
  if time <= block:
    return _one_block(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, window=window)
  num_blocks = -(-time // block)
  tail = num_blocks * block - time
  # Whole blocks of keys before the first query: enough to reach back `window` rows.
  num_before = -(-window // block)
  front = num_before * block - (keys - time)

  def bands(x_BS, fill):
    """[B, S, ...] -> [B, U, M, ...]: block u of the queries sees key blocks u .. u + num_before."""
    x_BS = x_BS[:, max(0, -front) :]
    padding = ((0, 0), (max(0, front), tail)) + ((0, 0),) * (x_BS.ndim - 2)
    x_BS = jnp.pad(x_BS, padding, constant_values=fill)
    blocks = x_BS.reshape(x_BS.shape[0], num_before + num_blocks, block, *x_BS.shape[2:])
    shifted = [blocks[:, shift : shift + num_blocks] for shift in range(num_before + 1)]
    return jnp.concatenate(shifted, axis=2)

  def blocks_of(x_BT, fill):
    padding = ((0, 0), (0, tail)) + ((0, 0),) * (x_BT.ndim - 2)
    x_BT = jnp.pad(x_BT, padding, constant_values=fill)
    return x_BT.reshape(x_BT.shape[0], num_blocks, block, *x_BT.shape[2:])

  distance_CM = (num_before * block + jnp.arange(block))[:, None] - jnp.arange(
    (num_before + 1) * block
  )[None]
  in_band_CM = (distance_CM >= 0) & (distance_CM <= window)
  q_documents_BUC = blocks_of(q_documents_BT, _NO_DOCUMENT)
  k_documents_BUM = bands(k_documents_BS, _NO_DOCUMENT)
  visible_BUCM = in_band_CM & (q_documents_BUC[..., None] == k_documents_BUM[:, :, None])
  o_BUCNH = _weighted(blocks_of(q_BTNH, 0), bands(k_BSH, 0), bands(v_BSH, 0), visible_BUCM)
  return o_BUCNH.reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])[:, :time]


def _one_block(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, *, window):
  """A few queries, one when decoding, against the keys that the first of them can reach."""
  time = q_BTNH.shape[1]
  band = min(k_BSH.shape[1], window + time)
  k_BMH, v_BMH, documents_BM = (x[:, -band:] for x in (k_BSH, v_BSH, k_documents_BS))
  distance_TM = (band - time + jnp.arange(time))[:, None] - jnp.arange(band)[None]
  in_band_TM = (distance_TM >= 0) & (distance_TM <= window)
  visible_BTM = in_band_TM & (q_documents_BT[:, :, None] == documents_BM[:, None])
  o_BUTNH = _weighted(q_BTNH[:, None], k_BMH[:, None], v_BMH[:, None], visible_BTM[:, None])
  return o_BUTNH[:, 0]


def _global(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS):
  """One block of queries at a time against all keys."""
  batch, time, num_heads, head_size = q_BTNH.shape
  keys = k_BSH.shape[1]
  block = min(time, _MAX_BLOCK)
  num_blocks = -(-time // block)
  tail = num_blocks * block - time
  q_BUCNH = jnp.pad(q_BTNH, ((0, 0), (0, tail), (0, 0), (0, 0))).reshape(
    batch, num_blocks, block, num_heads, head_size
  )
  q_documents_BUC = jnp.pad(
    q_documents_BT, ((0, 0), (0, tail)), constant_values=_NO_DOCUMENT
  ).reshape(batch, num_blocks, block)
  row_UC = (keys - time + jnp.arange(num_blocks * block)).reshape(num_blocks, block)

  def one_block(q_BCNH, q_documents_BC, row_C):
    causal_CS = row_C[:, None] >= jnp.arange(keys)[None]
    visible_BCS = causal_CS & (q_documents_BC[..., None] == k_documents_BS[:, None])
    return _weighted(q_BCNH[:, None], k_BSH[:, None], v_BSH[:, None], visible_BCS[:, None])[:, 0]

  one_block = jax.checkpoint(one_block, prevent_cse=False)
  o_UBCNH = jax.lax.map(
    lambda block: one_block(*block),
    (q_BUCNH.swapaxes(0, 1), q_documents_BUC.swapaxes(0, 1), row_UC),
  )
  return o_UBCNH.swapaxes(0, 1).reshape(batch, -1, num_heads, head_size)[:, :time]


def _weighted(q_BUCNH, k_BUMH, v_BUMH, visible_BUCM):
  """softmax over a band: logits, weights and their sum in float32, products in the inputs'
  dtype."""
  scale = q_BUCNH.shape[-1] ** -0.5
  logits_BUCNM = jnp.einsum(
    "BUCNH,BUMH->BUCNM", q_BUCNH, k_BUMH, preferred_element_type=jnp.float32
  )
  logits_BUCNM = jnp.where(visible_BUCM[:, :, :, None], logits_BUCNM * scale, _HIDDEN)
  # The largest logit is a constant of the softmax: no gradient has to find it again.
  largest_BUCN1 = jax.lax.stop_gradient(jnp.max(logits_BUCNM, axis=-1, keepdims=True))
  weights_BUCNM = jnp.exp(logits_BUCNM - largest_BUCN1)
  sum_BUCN1 = jnp.sum(weights_BUCNM, axis=-1, keepdims=True)
  o_BUCNH = jnp.einsum(
    "BUCNM,BUMH->BUCNH",
    weights_BUCNM.astype(v_BUMH.dtype),
    v_BUMH,
    preferred_element_type=jnp.float32,
  )
  return (o_BUCNH / sum_BUCN1).astype(q_BUCNH.dtype)
