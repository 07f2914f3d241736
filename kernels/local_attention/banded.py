"""Attention in blocks of queries, each against the band of keys that it can reach.

Letters of this file: U blocks of a row, C queries of a block, M keys of a band. The backward pass
forms the weights again from the logits and their log-sum-exp, as flash attention does
(arXiv:2205.14135): kept are q, k, v, the output and one number per query and head.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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
  time, keys = q_BTNH.shape[1], k_BSH.shape[1]
  is_global = window is None or window >= keys
  window = keys if window is None or window >= keys else window
  block = _MAX_BLOCK if is_global else min(_MAX_BLOCK, max(16, window // 4))
  arrays = (q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS)
  if time <= block:
    return _one_block(*arrays, window=window)
  return _global(*arrays, block=block) if is_global else _local(*arrays, window=window, block=block)


def _local(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, *, window, block):
  """All blocks at once."""
  time, keys = q_BTNH.shape[1], k_BSH.shape[1]
  num_blocks = -(-time // block)
  # Whole blocks of keys before the first query: enough to reach back `window` rows.
  num_before = -(-window // block)
  front, tail = num_before * block - (keys - time), num_blocks * block - time

  def bands(x_BS, fill):
    """[B, S, ...] -> [B, U, M, ...]: block u of the queries sees key blocks u .. u + num_before."""
    x_BS = x_BS[:, max(0, -front) :]
    padding = ((0, 0), (max(0, front), tail)) + ((0, 0),) * (x_BS.ndim - 2)
    x_BS = jnp.pad(x_BS, padding, constant_values=fill)
    blocks = x_BS.reshape(x_BS.shape[0], num_before + num_blocks, block, *x_BS.shape[2:])
    shifted = [blocks[:, shift : shift + num_blocks] for shift in range(num_before + 1)]
    return jnp.concatenate(shifted, axis=2)

  o_BUCNH = _attend(
    _blocks(q_BTNH, num_blocks, block, 0),
    bands(k_BSH, 0),
    bands(v_BSH, 0),
    _blocks(q_documents_BT, num_blocks, block, _NO_DOCUMENT),
    bands(k_documents_BS, _NO_DOCUMENT),
    num_before * block + jnp.arange(block),
    jnp.arange((num_before + 1) * block),
    window,
  )
  return o_BUCNH.reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])[:, :time]


def _one_block(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, *, window):
  """A few queries, one when decoding, against the keys that the first of them can reach."""
  time = q_BTNH.shape[1]
  band = min(k_BSH.shape[1], window + time)
  queries = (q_BTNH[:, None], k_BSH[:, None, -band:], v_BSH[:, None, -band:])
  documents = (q_documents_BT[:, None], k_documents_BS[:, None, -band:])
  rows = (band - time + jnp.arange(time), jnp.arange(band))
  return _attend(*queries, *documents, *rows, window)[:, 0]


def _global(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, *, block):
  """One block of queries at a time against all keys."""
  time, keys = q_BTNH.shape[1], k_BSH.shape[1]
  num_blocks = -(-time // block)
  q_BUCNH = _blocks(q_BTNH, num_blocks, block, 0)
  q_documents_BUC = _blocks(q_documents_BT, num_blocks, block, _NO_DOCUMENT)
  row_UC = (keys - time + jnp.arange(num_blocks * block)).reshape(num_blocks, block)
  k_BUMH, v_BUMH, k_documents_BUM = k_BSH[:, None], v_BSH[:, None], k_documents_BS[:, None]

  def one_block(inputs):
    q_BCNH, q_documents_BC, row_C = inputs
    queries = (q_BCNH[:, None], k_BUMH, v_BUMH, q_documents_BC[:, None], k_documents_BUM)
    return _attend(*queries, row_C, jnp.arange(keys), keys)[:, 0]

  o_UBCNH = jax.lax.map(one_block, (q_BUCNH.swapaxes(0, 1), q_documents_BUC.swapaxes(0, 1), row_UC))
  o_BUCNH = o_UBCNH.swapaxes(0, 1)
  return o_BUCNH.reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])[:, :time]


def _blocks(x_BT, num_blocks, block, fill):
  """[B, T, ...] -> [B, U, C, ...], filled up at the end."""
  padding = ((0, 0), (0, num_blocks * block - x_BT.shape[1])) + ((0, 0),) * (x_BT.ndim - 2)
  x_BT = jnp.pad(x_BT, padding, constant_values=fill)
  return x_BT.reshape(x_BT.shape[0], num_blocks, block, *x_BT.shape[2:])


def _attend(
  q_BUCNH: jax.Array,
  k_BUMH: jax.Array,
  v_BUMH: jax.Array,
  q_documents_BUC: jax.Array,
  k_documents_BUM: jax.Array,
  row_C: jax.Array,
  row_M: jax.Array,
  window: int,
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over what is visible: logits, weights and their sum in float32,
  products in the inputs' dtype."""
  arrays = (q_BUCNH, k_BUMH, v_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M)
  return cast(jax.Array, _differentiable(*arrays, window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _differentiable(
  q_BUCNH, k_BUMH, v_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M, window
):
  arrays = (q_BUCNH, k_BUMH, v_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M)
  return _attend_and_keep(*arrays, window)[0]


def _attend_and_keep(
  q_BUCNH, k_BUMH, v_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M, window
):
  logits_BUCNM = _logits(
    q_BUCNH, k_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M, window=window
  )
  largest_BUCN1 = jnp.max(logits_BUCNM, axis=-1, keepdims=True)
  weights_BUCNM = jnp.exp(logits_BUCNM - largest_BUCN1)
  sum_BUCN1 = jnp.sum(weights_BUCNM, axis=-1, keepdims=True)
  o_BUCNH = jnp.einsum(
    "BUCNM,BUMH->BUCNH",
    weights_BUCNM.astype(v_BUMH.dtype),
    v_BUMH,
    preferred_element_type=jnp.float32,
  )
  # A remat policy can keep what is named, rather than attend again.
  o_BUCNH = checkpoint_name((o_BUCNH / sum_BUCN1).astype(q_BUCNH.dtype), "attention")
  log_sum_BUCN1 = checkpoint_name(largest_BUCN1 + jnp.log(sum_BUCN1), "attention")
  inputs = (q_BUCNH, k_BUMH, v_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M)
  return o_BUCNH, (*inputs, o_BUCNH, log_sum_BUCN1)


def _attend_backward(window, kept, do_BUCNH):
  *inputs, o_BUCNH, log_sum_BUCN1 = kept
  q_BUCNH, k_BUMH, v_BUMH, *visibility = inputs
  scale, dtype = q_BUCNH.shape[-1] ** -0.5, q_BUCNH.dtype
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  weights_BUCNM = jnp.exp(_logits(q_BUCNH, k_BUMH, *visibility, window=window) - log_sum_BUCN1)
  dweights_BUCNM = product("BUCNH,BUMH->BUCNM", do_BUCNH, v_BUMH)
  # sum_m w_m dw_m, from the output: o is what the weights make of v.
  mean_BUCN1 = jnp.sum(
    do_BUCNH.astype(jnp.float32) * o_BUCNH.astype(jnp.float32), axis=-1, keepdims=True
  )
  dlogits_BUCNM = (weights_BUCNM * (dweights_BUCNM - mean_BUCN1) * scale).astype(dtype)
  dq_BUCNH = product("BUCNM,BUMH->BUCNH", dlogits_BUCNM, k_BUMH)
  dk_BUMH = product("BUCNM,BUCNH->BUMH", dlogits_BUCNM, q_BUCNH)
  dv_BUMH = product("BUCNM,BUCNH->BUMH", weights_BUCNM.astype(dtype), do_BUCNH)
  grads = (dq_BUCNH.astype(dtype), dk_BUMH.astype(k_BUMH.dtype), dv_BUMH.astype(v_BUMH.dtype))
  return *grads, *(None for _ in visibility)


_differentiable.defvjp(_attend_and_keep, _attend_backward)


def _logits(q_BUCNH, k_BUMH, q_documents_BUC, k_documents_BUM, row_C, row_M, *, window):
  """Scaled logits, float32; _HIDDEN where a query does not see a key."""
  distance_CM = row_C[:, None] - row_M[None]
  in_band_CM = (distance_CM >= 0) & (distance_CM <= window)
  visible_BUCM = in_band_CM & (q_documents_BUC[..., None] == k_documents_BUM[:, :, None])
  logits_BUCNM = jnp.einsum(
    "BUCNH,BUMH->BUCNM", q_BUCNH, k_BUMH, preferred_element_type=jnp.float32
  )
  scale = q_BUCNH.shape[-1] ** -0.5
  return jnp.where(visible_BUCM[:, :, :, None], logits_BUCNM * scale, _HIDDEN)
