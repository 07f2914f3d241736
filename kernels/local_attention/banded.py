"""Attention one block of queries at a time, each against the band of keys that it can reach.

Letters of this file: C queries of a block, M keys of a band; P is T or S padded to whole blocks.
The backward pass forms the weights again from the logits and their log-sum-exp, as flash attention
does (arXiv:2205.14135): kept are q, k, v, the output and one number per query and head. Only the
logits of one block exist at a time: on a CPU they stay in its cache. Below `attention` there is one
key-value head, and N are its query heads.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Finite, so that a padding query, which sees nothing, has weights and no NaN; exp of it is 0.
_HIDDEN = -1e30
# The largest block of queries: a band has window + block keys, of which a query sees window + 1.
_MAX_BLOCK = 128


class _Layout(NamedTuple):
  """Which queries meet which keys: `band` keys from the block's start on, or all keys from 0 on."""

  time: int
  keys: int
  window: int
  block: int

  @property
  def num_blocks(self) -> int:
    return -(-self.time // self.block)

  @property
  def band(self) -> int:
    return min(self.keys, self.window + self.block)

  @property
  def is_sliced(self) -> bool:
    return self.band < self.keys

  @property
  def unreachable(self) -> int:
    """Keys before the reach of the first query: they are left out."""
    return max(0, self.keys - self.time - self.window) if self.is_sliced else 0

  @property
  def missing(self) -> int:
    """Rows that the first query can reach before the first key: they are padding."""
    return max(0, self.window - (self.keys - self.time)) if self.is_sliced else 0


def attention(
  q_BTNH: jax.Array,
  k_BSEH: jax.Array,
  v_BSEH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """As kernels/local_attention says; logits exist for one block of queries at a time."""
  batch, time, heads, head_size = q_BTNH.shape
  keys, kv_heads = k_BSEH.shape[1:3]
  window = keys if window is None else min(window, keys)
  # Smaller blocks multiply fewer keys that are then masked; larger blocks are fewer products.
  block = min(time, _MAX_BLOCK, max(16, window // 4))
  layout = _Layout(time, keys, window, block)

  def attend(*arrays: jax.Array) -> jax.Array:
    return cast(jax.Array, _attend(*arrays, layout))

  documents = (q_documents_BT, k_documents_BS)
  if kv_heads == 1:
    return attend(q_BTNH, k_BSEH.squeeze(2), v_BSEH.squeeze(2), *documents)
  q_BTEQH = q_BTNH.reshape(batch, time, kv_heads, heads // kv_heads, head_size)
  of_heads = jax.vmap(attend, in_axes=(2, 2, 2, None, None), out_axes=2)
  return of_heads(q_BTEQH, k_BSEH, v_BSEH, *documents).reshape(q_BTNH.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, layout):
  return _forward(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, layout)[0]


def _forward(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, layout):
  queries = _fill_queries((q_BTNH, q_documents_BT), layout)
  keys = _fill_keys((k_BSH, v_BSH, k_documents_BS), layout)

  def one_block(_, start):
    q_BCNH, q_documents_BC = _cut(queries, start, layout.block)
    k_BMH, v_BMH, k_documents_BM = _cut_band(keys, start, layout)
    visible_BCM = _visible(q_documents_BC, k_documents_BM, start, layout)
    logits_BCNM = _logits(q_BCNH, k_BMH, visible_BCM)
    largest_BCN1 = jnp.max(logits_BCNM, axis=-1, keepdims=True)
    weights_BCNM = jnp.exp(logits_BCNM - largest_BCN1)
    sum_BCN1 = jnp.sum(weights_BCNM, axis=-1, keepdims=True)
    o_BCNH = _product("BCNM,BMH->BCNH", weights_BCNM.astype(v_BMH.dtype), v_BMH) / sum_BCN1
    return None, (o_BCNH, largest_BCN1 + jnp.log(sum_BCN1))

  _, blocks = _over_blocks(one_block, None, layout)
  o_BTNH, log_sum_BTN1 = (_join(x, layout) for x in blocks)
  # Named, so that a remat policy can keep it instead of computing attention again.
  o_BTNH = checkpoint_name(o_BTNH.astype(q_BTNH.dtype), "attention")
  log_sum_BTN1 = checkpoint_name(log_sum_BTN1, "attention")
  inputs = (q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS)
  return o_BTNH, (*inputs, o_BTNH, log_sum_BTN1)


def _backward(layout, kept, do_BTNH):
  q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, o_BTNH, log_sum_BTN1 = kept
  # sum_m w_m dw_m, from the output, because o = sum_m w_m v_m.
  mean_BTN1 = jnp.sum(
    do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), axis=-1, keepdims=True
  )
  queries = _fill_queries((q_BTNH, q_documents_BT, do_BTNH, log_sum_BTN1, mean_BTN1), layout)
  keys = _fill_keys((k_BSH, v_BSH, k_documents_BS), layout)
  scale, dtype = q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype

  def one_block(grads, start):
    q_BCNH, q_documents_BC, do_BCNH, log_sum_BCN1, mean_BCN1 = _cut(queries, start, layout.block)
    k_BMH, v_BMH, k_documents_BM = _cut_band(keys, start, layout)
    visible_BCM = _visible(q_documents_BC, k_documents_BM, start, layout)
    weights_BCNM = jnp.exp(_logits(q_BCNH, k_BMH, visible_BCM) - log_sum_BCN1)
    dweights_BCNM = _product("BCNH,BMH->BCNM", do_BCNH, v_BMH)
    dlogits_BCNM = (weights_BCNM * (dweights_BCNM - mean_BCN1) * scale).astype(dtype)
    dq_BCNH = _product("BCNM,BMH->BCNH", dlogits_BCNM, k_BMH)
    dk_BMH = _sum_of_queries(dlogits_BCNM, q_BCNH)
    dv_BMH = _sum_of_queries(weights_BCNM.astype(dtype), do_BCNH)
    return _add_band(grads, (dk_BMH, dv_BMH), start, layout), dq_BCNH

  # Float32: a key's gradient is a sum over the blocks that see it.
  zeros_BPH = jnp.zeros_like(keys[0], jnp.float32)
  (dk_BPH, dv_BPH), dq_blocks = _over_blocks(one_block, (zeros_BPH, zeros_BPH), layout)
  dq_BTNH = _join(dq_blocks, layout).astype(dtype)
  dk_BSH = _keys_of(dk_BPH, layout).astype(k_BSH.dtype)
  return dq_BTNH, dk_BSH, _keys_of(dv_BPH, layout).astype(v_BSH.dtype), None, None


_attend.defvjp(_forward, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _sum_of_queries(x_BCNM, y_BCNH):
  """sum_cn x_bcnm y_bcnh, float32; C and N are merged, or a CPU would make a transposed copy."""
  batch, _, _, keys = x_BCNM.shape
  y_BRH = y_BCNH.reshape(batch, -1, y_BCNH.shape[-1])
  return _product("BRM,BRH->BMH", x_BCNM.reshape(batch, -1, keys), y_BRH)


def _logits(q_BCNH, k_BMH, visible_BCM):
  """Scaled logits, float32; _HIDDEN where a query does not see a key."""
  logits_BCNM = _product("BCNH,BMH->BCNM", q_BCNH, k_BMH) * q_BCNH.shape[-1] ** -0.5
  return jnp.where(visible_BCM[:, :, None], logits_BCNM, _HIDDEN)


def _visible(q_documents_BC, k_documents_BM, start, layout):
  """Same document, 0 <= distance <= window, and not padding."""
  row_C = start + jnp.arange(layout.block)
  row_M = jnp.arange(layout.band)
  if layout.is_sliced:
    row_C, row_M = row_C + layout.window, row_M + start
  else:
    row_C = row_C + layout.keys - layout.time
  distance_CM = row_C[:, None] - row_M
  in_band_CM = (distance_CM >= 0) & (distance_CM <= layout.window) & (row_M >= layout.missing)
  return in_band_CM & (q_documents_BC[..., None] == k_documents_BM[:, None])


def _over_blocks(one_block, carry, layout):
  """jax.lax.scan over the first queries of the blocks; no loop for one block, as when decoding."""
  if layout.num_blocks == 1:
    carry, outputs = one_block(carry, 0)
    return carry, jax.tree.map(lambda x: x[None], outputs)
  # Outputs of blocks are float32 and rounded after the loop: see kernels/linear_scan/reference.py.
  return jax.lax.scan(one_block, carry, jnp.arange(layout.num_blocks) * layout.block)


def _join(x_blocks, layout):
  """[blocks, B, C, ...] -> [B, T, ...]."""
  x_BP = x_blocks.swapaxes(0, 1)
  return x_BP.reshape(x_BP.shape[0], -1, *x_BP.shape[3:])[:, : layout.time]


def _fill_queries(arrays, layout):
  """[B, T, ...] -> [B, P, ...] with zeros at the end. They get no gradient: do is 0 there too."""
  fill = layout.num_blocks * layout.block - layout.time
  return tuple(_pad(x_BT, 0, fill) for x_BT in arrays)


def _fill_keys(arrays, layout):
  """[B, S, ...] -> [B, P, ...]: the rows from `window` before the first query on, if sliced."""
  if not layout.is_sliced:
    return arrays
  fill = layout.num_blocks * layout.block - layout.time
  return tuple(_pad(x_BS[:, layout.unreachable :], layout.missing, fill) for x_BS in arrays)


def _keys_of(x_BP, layout):
  """[B, P, ...] -> [B, S, ...], the inverse of _fill_keys; 0 for keys that no query reaches."""
  if not layout.is_sliced:
    return x_BP
  end = layout.missing + layout.keys - layout.unreachable
  return _pad(x_BP[:, layout.missing : end], layout.unreachable, 0)


def _pad(x_BT, front, back):
  return jnp.pad(x_BT, ((0, 0), (front, back)) + ((0, 0),) * (x_BT.ndim - 2))


def _cut(arrays, start, length):
  return tuple(jax.lax.dynamic_slice_in_dim(x_BP, start, length, axis=1) for x_BP in arrays)


def _cut_band(keys, start, layout):
  return _cut(keys, start, layout.band) if layout.is_sliced else keys


def _add_band(sums, terms, start, layout):
  """Adds the terms of a block to the sums of its band of keys."""
  if not layout.is_sliced:
    return tuple(x_BSH + y_BSH for x_BSH, y_BSH in zip(sums, terms))
  return tuple(
    jax.lax.dynamic_update_slice_in_dim(x_BPH, before_BMH + y_BMH, start, axis=1)
    for x_BPH, before_BMH, y_BMH in zip(sums, _cut(sums, start, layout.band), terms)
  )
