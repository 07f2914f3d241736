"""Flash attention (arXiv:2205.14135) as Triton kernels, for Hopper and Ampere; not run there yet.

Letters of this file: C queries of a block, M keys of a block. A program has a block of queries of
one head and goes over the keys that it can reach, a block at a time; backward, another one has a
block of keys and goes over the queries that reach it, of every head, so that the gradients of the
one key and value are summed in float32 registers. Logits of one block alone exist.

Compiled ahead of time for H100 and A100 (2026-11-25, jax 0.10.2, ptxas 13.5, no device): the
products are the tensor cores', keys are copied a block ahead; up to head size 128 no register is
spilled, at 256 0.3 KB a thread.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Triton's blocks are powers of two, tensor cores' at least 16; wider heads do not fit registers.
HEAD_SIZES = (16, 32, 64, 128, 256)
# Finite, so that a row that sees nothing in a block has weights and no NaN; exp2 of it is 0.
_HIDDEN = -1e30
_BLOCK = 64


class _Layout(NamedTuple):
  """Which queries and keys meet, and how they are cut."""

  time: int
  keys: int
  heads: int
  size: int
  window: int
  block: int

  @property
  def offset(self) -> int:
    """The row of query 0 among the keys."""
    return self.keys - self.time


def attention(
  q_BTNH: jax.Array,
  k_BSH: jax.Array,
  v_BSH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """As kernels/local_attention says, for HEAD_SIZES; interpreted, slowly, on CPU."""
  _, time, heads, size = q_BTNH.shape
  keys = k_BSH.shape[1]
  if size not in HEAD_SIZES:
    raise ValueError(f"local_attention: head size {size} is none of pallas_gpu's, {HEAD_SIZES}")
  window = keys if window is None else min(window, keys)
  # Two blocks each of keys and values, and two of queries, have to fit shared memory.
  block = _BLOCK if size * q_BTNH.dtype.itemsize <= 256 * 2 else _BLOCK // 2
  layout = _Layout(time, keys, heads, size, window, block)
  arrays = (q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS)
  return cast(jax.Array, _attend(*arrays, layout))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, layout):
  return _forward(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, layout)[0]


def _forward(q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS, layout):
  inputs = (q_BTNH, k_BSH, v_BSH, q_documents_BT, k_documents_BS)
  batch = q_BTNH.shape[0]
  o_BTNH, log_sum_BNT = _call(
    _outputs,
    inputs,
    (q_BTNH, jax.ShapeDtypeStruct((batch, layout.heads, layout.time), jnp.float32)),
    (pl.cdiv(layout.time, layout.block), layout.heads, batch),
    layout,
    num_warps=4 if layout.size <= 128 else 8,
    name="local_attention_forward",
  )
  # A remat policy can keep what is named, rather than attend again.
  o_BTNH = checkpoint_name(o_BTNH, "attention")
  log_sum_BNT = checkpoint_name(log_sum_BNT, "attention")
  return o_BTNH, (*inputs, o_BTNH, log_sum_BNT)


def _backward(layout, kept, do_BTNH):
  *inputs, o_BTNH, log_sum_BNT = kept
  q_BTNH, k_BSH, v_BSH, _, _ = inputs
  # sum_m w_m dw_m, from the output: o is what the weights make of v.
  mean_BNT = jnp.einsum("BTNH,BTNH->BNT", do_BTNH.astype(jnp.float32), o_BTNH.astype(jnp.float32))
  arrays = (*inputs, do_BTNH, log_sum_BNT, mean_BNT)
  batch = q_BTNH.shape[0]
  (dq_BTNH,) = _call(
    _query_gradients,
    arrays,
    (q_BTNH,),
    (pl.cdiv(layout.time, layout.block), layout.heads, batch),
    layout,
    num_warps=4 if layout.size <= 128 else 8,
    name="local_attention_backward_queries",
  )
  dk_BSH, dv_BSH = _call(
    _key_gradients,
    arrays,
    (k_BSH, v_BSH),
    (pl.cdiv(layout.keys, layout.block), batch),
    layout,
    # Two sums [M, H] lie in their registers.
    num_warps=4 if layout.size <= 64 else 8,
    name="local_attention_backward_keys",
  )
  return dq_BTNH, dk_BSH, dv_BSH, None, None


_attend.defvjp(_forward, _backward)


def _call(kernel, arrays, like, grid, layout, *, num_warps, name):
  """One program of `kernel` for each place of the grid; results are shaped as `like`."""

  def call(interpret, *arrays):
    return pl.pallas_call(
      functools.partial(kernel, layout=layout),
      grid=grid,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
      compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=2),
      interpret=interpret,
      name=name,
    )(*arrays)

  # By the platform that the program is lowered for; on others than these lowering fails.
  return jax.lax.platform_dependent(
    *arrays, cpu=functools.partial(call, True), cuda=functools.partial(call, False)
  )


def _outputs(q_ref, k_ref, v_ref, qd_ref, kd_ref, o_ref, log_sum_ref, *, layout):
  queries = _Queries.of(pl.program_id(2), pl.program_id(1), pl.program_id(0), layout)
  q_CH, documents_C = queries.load(q_ref), queries.load_documents(qd_ref)

  def one_block(index, carry):
    o_CH, largest_C, sum_C = carry
    keys = _Keys.of(queries.row, index, layout)
    k_MH, v_MH, documents_M = keys.load(k_ref), keys.load(v_ref), keys.load_documents(kd_ref)
    logits_CM = _logits(q_CH, k_MH, documents_C, documents_M, queries, keys, layout)
    next_C = jnp.maximum(largest_C, jnp.max(logits_CM, axis=1))
    weights_CM = jnp.exp2(logits_CM - next_C[:, None])
    shrink_C = jnp.exp2(largest_C - next_C)
    o_CH = o_CH * shrink_C[:, None] + _dot(weights_CM.astype(v_MH.dtype), v_MH)
    return o_CH, next_C, sum_C * shrink_C + jnp.sum(weights_CM, axis=1)

  zeros_C = jnp.zeros((layout.block,), jnp.float32)
  zeros_CH = jnp.zeros((layout.block, layout.size), jnp.float32)
  carry = (zeros_CH, zeros_C + _HIDDEN, zeros_C)
  o_CH, largest_C, sum_C = jax.lax.fori_loop(*queries.key_blocks(layout), one_block, carry)
  queries.store(o_ref, o_CH / sum_C[:, None])
  queries.store_number(log_sum_ref, largest_C + jnp.log2(sum_C))


def _query_gradients(
  q_ref, k_ref, v_ref, qd_ref, kd_ref, do_ref, log_sum_ref, mean_ref, dq_ref, *, layout
):
  queries = _Queries.of(pl.program_id(2), pl.program_id(1), pl.program_id(0), layout)
  q_CH, documents_C = queries.load(q_ref), queries.load_documents(qd_ref)
  do_CH, log_sum_C = queries.load(do_ref), queries.load_number(log_sum_ref)
  mean_C = queries.load_number(mean_ref)

  def one_block(index, dq_CH):
    keys = _Keys.of(queries.row, index, layout)
    k_MH, v_MH, documents_M = keys.load(k_ref), keys.load(v_ref), keys.load_documents(kd_ref)
    logits_CM = _logits(q_CH, k_MH, documents_C, documents_M, queries, keys, layout)
    weights_CM = jnp.exp2(logits_CM - log_sum_C[:, None])
    dlogits_CM = weights_CM * (_dot(do_CH, v_MH, trans_b=True) - mean_C[:, None])
    return dq_CH + _dot(dlogits_CM.astype(k_MH.dtype), k_MH)

  dq_CH = jnp.zeros((layout.block, layout.size), jnp.float32)
  dq_CH = jax.lax.fori_loop(*queries.key_blocks(layout), one_block, dq_CH)
  queries.store(dq_ref, dq_CH * layout.size**-0.5)


def _key_gradients(
  q_ref, k_ref, v_ref, qd_ref, kd_ref, do_ref, log_sum_ref, mean_ref, dk_ref, dv_ref, *, layout
):
  keys = _Keys.of(pl.program_id(1), pl.program_id(0), layout)
  k_MH, v_MH, documents_M = keys.load(k_ref), keys.load(v_ref), keys.load_documents(kd_ref)
  first, last = keys.query_blocks(layout)

  def one_block(index, head, carry):
    dk_MH, dv_MH = carry
    queries = _Queries.of(keys.row, head, index, layout)
    q_CH, documents_C = queries.load(q_ref), queries.load_documents(qd_ref)
    do_CH, log_sum_C = queries.load(do_ref), queries.load_number(log_sum_ref)
    mean_C = queries.load_number(mean_ref)
    logits_CM = _logits(q_CH, k_MH, documents_C, documents_M, queries, keys, layout)
    weights_CM = jnp.exp2(logits_CM - log_sum_C[:, None])
    dlogits_CM = weights_CM * (_dot(do_CH, v_MH, trans_b=True) - mean_C[:, None])
    dk_MH += _dot(dlogits_CM.astype(q_CH.dtype), q_CH, trans_a=True)
    return dk_MH, dv_MH + _dot(weights_CM.astype(do_CH.dtype), do_CH, trans_a=True)

  def one_head(head, carry):
    return jax.lax.fori_loop(first, last, functools.partial(_swapped, one_block, head), carry)

  zeros_MH = jnp.zeros((layout.block, layout.size), jnp.float32)
  dk_MH, dv_MH = jax.lax.fori_loop(0, layout.heads, one_head, (zeros_MH, zeros_MH))
  keys.store(dk_ref, dk_MH * layout.size**-0.5)
  keys.store(dv_ref, dv_MH)


def _swapped(f, head, index, carry):
  return f(index, head, carry)


def _dot(a, b, *, trans_a=False, trans_b=False):
  # Float32 operands would be rounded to TF32.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def _logits(q_CH, k_MH, documents_C, documents_M, queries, keys, layout):
  """Scaled logits in units of log 2, float32; _HIDDEN where a query does not see a key."""
  distance_CM = (queries.index_C + layout.offset)[:, None] - keys.index_M[None]
  visible_CM = (distance_CM >= 0) & (distance_CM <= layout.window)
  visible_CM &= documents_C[:, None] == documents_M[None]
  visible_CM &= queries.is_real_C[:, None] & keys.is_real_M[None]
  logits_CM = _dot(q_CH, k_MH, trans_b=True) * (layout.size**-0.5 * math.log2(math.e))
  return jnp.where(visible_CM, logits_CM, _HIDDEN)


class _Queries(NamedTuple):
  """A block of queries of one row and head; what is not there is loaded as 0."""

  row: Any
  head: Any
  span: Any
  index_C: jax.Array
  is_real_C: jax.Array
  first: Any

  @classmethod
  def of(cls, row, head, index, layout):
    first, block = index * layout.block, layout.block
    index_C = first + jax.lax.iota(jnp.int32, block)
    return cls(row, head, pl.ds(first, block), index_C, index_C < layout.time, first)

  def key_blocks(self, layout):
    """The first block of keys within reach, and the one behind the last."""
    start = self.first + layout.offset
    stop = jnp.minimum(start + layout.block, layout.keys)
    return (
      jnp.maximum(start - layout.window, 0) // layout.block,
      pl.cdiv(stop, layout.block),
    )

  def _mask(self, size):
    return jnp.broadcast_to(self.is_real_C[:, None], (self.is_real_C.shape[0], size))

  def load(self, ref):
    mask_CH = self._mask(ref.shape[3])
    return plgpu.load(ref.at[self.row, self.span, self.head, :], mask=mask_CH, other=0)

  def store(self, ref, x_CH):
    mask_CH = self._mask(ref.shape[3])
    plgpu.store(ref.at[self.row, self.span, self.head, :], x_CH.astype(ref.dtype), mask=mask_CH)

  def load_documents(self, ref):
    return plgpu.load(ref.at[self.row, self.span], mask=self.is_real_C, other=0)

  def load_number(self, ref):
    return plgpu.load(ref.at[self.row, self.head, self.span], mask=self.is_real_C, other=0)

  def store_number(self, ref, x_C):
    plgpu.store(ref.at[self.row, self.head, self.span], x_C, mask=self.is_real_C)


class _Keys(NamedTuple):
  """A block of keys of one row; what is not there is loaded as 0."""

  row: Any
  span: Any
  index_M: jax.Array
  is_real_M: jax.Array
  first: Any

  @classmethod
  def of(cls, row, index, layout):
    first, block = index * layout.block, layout.block
    index_M = first + jax.lax.iota(jnp.int32, block)
    return cls(row, pl.ds(first, block), index_M, index_M < layout.keys, first)

  def query_blocks(self, layout):
    """The first block of queries that reach these keys, and the one behind the last."""
    first = self.first - layout.offset
    stop = jnp.clip(first + layout.block + layout.window, 0, layout.time)
    return (
      jnp.maximum(first, 0) // layout.block,
      pl.cdiv(stop, layout.block),
    )

  def _mask(self, size):
    return jnp.broadcast_to(self.is_real_M[:, None], (self.is_real_M.shape[0], size))

  def load(self, ref):
    return plgpu.load(ref.at[self.row, self.span, :], mask=self._mask(ref.shape[2]), other=0)

  def store(self, ref, x_MH):
    mask_MH = self._mask(ref.shape[2])
    plgpu.store(ref.at[self.row, self.span, :], x_MH.astype(ref.dtype), mask=mask_MH)

  def load_documents(self, ref):
    return plgpu.load(ref.at[self.row, self.span], mask=self.is_real_M, other=0)
