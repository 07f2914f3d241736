"""Flash attention (arXiv:2205.14135) as Triton kernels, for Hopper and Ampere.

Letters of this file: C queries of a block, M keys of a block, G groups of query heads. Forward, a
program has a block of queries of one head and goes over the keys that it can reach, a block at a
time. Backward, another kernel has a block of keys of one key-value head and goes over the queries
that reach it, of one group of that head's query heads. So the gradients of the key and value that
they share are summed in float32 registers; the sums of groups are added outside. Only the logits of
one block exist at a time. Where all keys of a block are near, only documents are compared.

On an H100 (docs/h100_attention.jsonl): 315 TFLOP/s forward and 258 backward at rows of 2048, 16
heads of 128. cuDNN's kernels, which know no documents, reach 437 and 315 there. Up to head size 128
no register is spilled, at 256 80 bytes a thread in one of the three kernels (ptxas 13.5).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels import gpu_math
from kernels.triton_call import on_gpu_or_interpreted, shape_of

# Triton's blocks are powers of two, tensor cores' at least 16; wider heads do not fit registers.
HEAD_SIZES = (16, 32, 64, 128, 256)
# Finite, so that a query that sees nothing in a block has weights and no NaN; exp2 of it is 0.
_HIDDEN = -1e30
_BLOCK = 64
# So many programs of unequal length keep an H100 (132 multiprocessors) busy to the end.
_PROGRAMS = 1024


class _Layout(NamedTuple):
  """Which queries and keys meet, and how they are cut."""

  time: int
  keys: int
  heads: int
  kv_heads: int
  size: int
  window: int
  query_block: int
  key_block: int

  @property
  def scale(self) -> float:
    """The factor of logits, in units of log 2."""
    return self.size**-0.5 * gpu_math.LOG2_E

  @property
  def offset(self) -> int:
    """The index of query 0 among the keys."""
    return self.keys - self.time

  def kv_head(self, head):
    """The key-value head of a query head."""
    if self.kv_heads == 1:
      return jnp.zeros((), jnp.int32)
    return jax.lax.div(head, jnp.int32(self.heads // self.kv_heads))


def attention(
  q_BTNH: jax.Array,
  k_BSEH: jax.Array,
  v_BSEH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """As kernels/local_attention says, for HEAD_SIZES; interpreted, slowly, on CPU."""
  _, time, heads, size = q_BTNH.shape
  keys, kv_heads = k_BSEH.shape[1:3]
  if size not in HEAD_SIZES:
    raise ValueError(f"local_attention: head size {size} is none of pallas_gpu's, {HEAD_SIZES}")
  window = keys if window is None else min(window, keys)
  # Two blocks each of keys and values, and two of queries, have to fit shared memory.
  block = _BLOCK if size * q_BTNH.dtype.itemsize <= 256 * 2 else _BLOCK // 2
  layout = _Layout(time, keys, heads, kv_heads, size, window, block, block)
  arrays = (q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS)
  return cast(jax.Array, _attend(*arrays, layout))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS, layout):
  return _forward(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS, layout)[0]


def _forward(q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS, layout):
  inputs = (q_BTNH, k_BSEH, v_BSEH, q_documents_BT, k_documents_BS)
  batch = q_BTNH.shape[0]
  o_BTNH, log_sum_BNT = _call(
    _outputs,
    inputs,
    (q_BTNH, jax.ShapeDtypeStruct((batch, layout.heads, layout.time), jnp.float32)),
    (pl.cdiv(layout.time, layout.query_block), layout.heads, batch),
    layout,
    num_warps=4 if layout.size <= 128 else 8,
    num_stages=_stages(q_BTNH),
    name="local_attention_forward",
  )
  # Named, so that a remat policy can keep it instead of computing attention again.
  o_BTNH = checkpoint_name(o_BTNH, "attention")
  log_sum_BNT = checkpoint_name(log_sum_BNT, "attention")
  return o_BTNH, (*inputs, o_BTNH, log_sum_BNT)


def _backward(layout, kept, do_BTNH):
  *inputs, o_BTNH, log_sum_BNT = kept
  q_BTNH, k_BSEH, *_ = inputs
  # sum_m w_m dw_m, from the output, because o = sum_m w_m v_m.
  mean_BNT = jnp.einsum("BTNH,BTNH->BNT", do_BTNH.astype(jnp.float32), o_BTNH.astype(jnp.float32))
  arrays = (*inputs, do_BTNH, log_sum_BNT, mean_BNT)
  batch = q_BTNH.shape[0]
  (dq_BTNH,) = _call(
    _query_gradients,
    arrays,
    (q_BTNH,),
    (pl.cdiv(layout.time, layout.query_block), layout.heads, batch),
    layout,
    num_warps=4 if layout.size <= 128 else 8,
    num_stages=2,
    name="local_attention_backward_queries",
  )
  layout = layout._replace(query_block=layout.query_block // 2)
  key_blocks = pl.cdiv(layout.keys, layout.key_block)
  kv_heads = layout.kv_heads
  groups = _head_groups(layout.heads // kv_heads, programs=key_blocks * kv_heads * batch)
  shape = (batch, groups, layout.keys, kv_heads, layout.size)
  dtype = k_BSEH.dtype if groups == 1 else jnp.float32
  dk_BGSEH, dv_BGSEH = _call(
    _key_gradients,
    arrays,
    2 * (jax.ShapeDtypeStruct(shape, dtype),),
    (key_blocks, kv_heads * groups, batch),
    layout,
    # Two sums [M, H] lie in their registers.
    num_warps=4 if layout.size <= 128 else 8,
    num_stages=_stages(q_BTNH),
    name="local_attention_backward_keys",
  )
  dk_BSEH, dv_BSEH = (jnp.sum(x, axis=1).astype(k_BSEH.dtype) for x in (dk_BGSEH, dv_BGSEH))
  return dq_BTNH, dk_BSEH, dv_BSEH, None, None


def _stages(q_BTNH: jax.Array) -> int:
  """Blocks of a loop that are in shared memory at once: as many as fit, up to three."""
  return 3 if q_BTNH.shape[-1] * q_BTNH.dtype.itemsize <= 128 * 2 else 2


def _head_groups(heads: int, *, programs: int) -> int:
  """Into how many groups the query heads of a block of keys are divided: as few as make enough
  programs."""
  divisors = (groups for groups in range(1, heads + 1) if heads % groups == 0)
  return next((groups for groups in divisors if groups * programs >= _PROGRAMS), heads)


_attend.defvjp(_forward, _backward)


class _Call(NamedTuple):
  """One program of `kernel` for each place of the grid."""

  kernel: Callable[..., None]
  results: tuple[jax.ShapeDtypeStruct, ...]
  grid: tuple[int, ...]
  layout: Any
  num_warps: int
  num_stages: int
  name: str

  def __call__(self, interpret: bool, *arrays: jax.Array) -> Any:
    return pl.pallas_call(
      functools.partial(self.kernel, layout=self.layout, math=gpu_math.of(interpret=interpret)),
      grid=self.grid,
      out_shape=list(self.results),
      compiler_params=plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages),
      interpret=interpret,
      name=self.name,
    )(*arrays)


def _call(kernel, arrays, like, grid, layout, *, num_warps, num_stages, name):
  """Results are shaped as `like`."""
  results = tuple(map(shape_of, like))
  call = _Call(kernel, results, grid, layout, num_warps, num_stages, name)
  return on_gpu_or_interpreted(call, *arrays)


def _outputs(q_ref, k_ref, v_ref, qd_ref, kd_ref, o_ref, log_sum_ref, *, layout, math):
  scale, kv_head = layout.scale, layout.kv_head(pl.program_id(1))
  queries = _Queries.of(pl.program_id(2), pl.program_id(1), pl.program_id(0), layout)
  q_CH, documents_C = queries.load(q_ref), queries.load_documents(qd_ref)

  def one_block(index, carry, *, is_inner):
    o_CH, largest_C, sum_C = carry
    keys = _Keys.of(queries.row, kv_head, index, layout)
    k_MH, v_MH, documents_M = keys.load(k_ref), keys.load(v_ref), keys.load_documents(kd_ref)
    visible_CM = documents_C[:, None] == documents_M[None]
    if not is_inner:
      visible_CM &= _is_near(queries.index_C[:, None], keys.index_M[None], layout)
    logits_CM = jnp.where(visible_CM, _dot(q_CH, k_MH, trans_b=True), _HIDDEN)
    next_C = jnp.maximum(largest_C, jnp.max(logits_CM, axis=1) * scale)
    # Before a query has seen any key, no key has a weight.
    shift_C = jnp.where(next_C > 0.01 * _HIDDEN, next_C, 0.0)
    weights_CM = math.exp2(math.fma(logits_CM, scale, -shift_C[:, None]))
    shrink_C = math.exp2(largest_C - next_C)
    o_CH = o_CH * shrink_C[:, None] + _dot(weights_CM.astype(v_MH.dtype), v_MH)
    return o_CH, next_C, sum_C * shrink_C + jnp.sum(weights_CM, axis=1)

  zeros_C = jnp.zeros((layout.query_block,), jnp.float32)
  zeros_CH = jnp.zeros((layout.query_block, layout.size), jnp.float32)
  carry = (zeros_CH, zeros_C + _HIDDEN, zeros_C)
  o_CH, largest_C, sum_C = _over_blocks(queries.key_blocks(layout), one_block, carry)
  queries.store(o_ref, o_CH / sum_C[:, None])
  queries.store_number(log_sum_ref, largest_C + jnp.log2(sum_C))


def _query_gradients(
  q_ref, k_ref, v_ref, qd_ref, kd_ref, do_ref, log_sum_ref, mean_ref, dq_ref, *, layout, math
):
  scale, kv_head = layout.scale, layout.kv_head(pl.program_id(1))
  queries = _Queries.of(pl.program_id(2), pl.program_id(1), pl.program_id(0), layout)
  q_CH, documents_C = queries.load(q_ref), queries.load_documents(qd_ref)
  do_CH, log_sum_C = queries.load(do_ref), queries.load_number(log_sum_ref)
  mean_C = queries.load_number(mean_ref)

  def one_block(index, dq_CH, *, is_inner):
    keys = _Keys.of(queries.row, kv_head, index, layout)
    k_MH, v_MH, documents_M = keys.load(k_ref), keys.load(v_ref), keys.load_documents(kd_ref)
    visible_CM = documents_C[:, None] == documents_M[None]
    if not is_inner:
      visible_CM &= _is_near(queries.index_C[:, None], keys.index_M[None], layout)
    logits_CM = math.fma(_dot(q_CH, k_MH, trans_b=True), scale, -log_sum_C[:, None])
    weights_CM = jnp.where(visible_CM, math.exp2(logits_CM), 0.0)
    dlogits_CM = weights_CM * (_dot(do_CH, v_MH, trans_b=True) - mean_C[:, None])
    return dq_CH + _dot(dlogits_CM.astype(k_MH.dtype), k_MH)

  dq_CH = jnp.zeros((layout.query_block, layout.size), jnp.float32)
  dq_CH = _over_blocks(queries.key_blocks(layout), one_block, dq_CH)
  queries.store(dq_ref, dq_CH * layout.size**-0.5)


def _key_gradients(
  q_ref,
  k_ref,
  v_ref,
  qd_ref,
  kd_ref,
  do_ref,
  log_sum_ref,
  mean_ref,
  dk_ref,
  dv_ref,
  *,
  layout,
  math,
):
  scale, groups = layout.scale, dk_ref.shape[1]
  # The query heads that this program sums over: groups of one key-value head follow each other.
  heads = layout.heads // (layout.kv_heads * groups)
  first = pl.program_id(1) * heads
  keys = _Keys.of(pl.program_id(2), layout.kv_head(first), pl.program_id(0), layout)
  k_MH, v_MH, documents_M = keys.load(k_ref), keys.load(v_ref), keys.load_documents(kd_ref)
  blocks = keys.query_blocks(layout)

  # Everything has keys as rows: a product's operand in registers cannot be transposed.
  def one_block(index, carry, *, is_inner, head):
    dk_MH, dv_MH = carry
    queries = _Queries.of(keys.row, head, index, layout)
    q_CH, documents_C = queries.load(q_ref), queries.load_documents(qd_ref)
    do_CH, log_sum_C = queries.load(do_ref), queries.load_number(log_sum_ref)
    mean_C = queries.load_number(mean_ref)
    visible_MC = documents_M[:, None] == documents_C[None]
    if not is_inner:
      visible_MC &= _is_near(queries.index_C[None], keys.index_M[:, None], layout)
    logits_MC = math.fma(_dot(k_MH, q_CH, trans_b=True), scale, -log_sum_C[None])
    weights_MC = jnp.where(visible_MC, math.exp2(logits_MC), 0.0)
    dlogits_MC = weights_MC * (_dot(v_MH, do_CH, trans_b=True) - mean_C[None])
    dk_MH += _dot(dlogits_MC.astype(q_CH.dtype), q_CH)
    return dk_MH, dv_MH + _dot(weights_MC.astype(do_CH.dtype), do_CH)

  def one_head(head, carry):
    return _over_blocks(blocks, functools.partial(one_block, head=head), carry)

  group = pl.program_id(1)
  if layout.kv_heads > 1:
    group = jax.lax.rem(group, jnp.int32(groups))
  zeros_MH = jnp.zeros((layout.key_block, layout.size), jnp.float32)
  dk_MH, dv_MH = jax.lax.fori_loop(first, first + heads, one_head, (zeros_MH, zeros_MH))
  keys.store(dk_ref, group, dk_MH * layout.size**-0.5)
  keys.store(dv_ref, group, dv_MH)


def _over_blocks(blocks, one_block, carry):
  """The carry after all blocks; in inner blocks, documents alone decide what a query sees."""
  num_before = blocks.inner - blocks.first

  def outer(number, carry):
    skipped = jnp.where(number < num_before, 0, blocks.behind - blocks.inner)
    return one_block(blocks.first + number + skipped, carry, is_inner=False)

  inner = functools.partial(one_block, is_inner=True)
  carry = jax.lax.fori_loop(blocks.inner, blocks.behind, inner, carry)
  return jax.lax.fori_loop(0, num_before + blocks.last - blocks.behind, outer, carry)


def _dot(a, b, *, trans_b=False):
  # Float32 operands would be rounded to TF32.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return plgpu.dot(a, b, trans_b=trans_b, precision=precision)


def _is_near(queries, keys, layout):
  """Whether a key is not padding, not after the query, and within its window."""
  distance = queries + layout.offset - keys
  return (distance >= 0) & (distance <= layout.window) & (keys < layout.keys)


class _Blocks(NamedTuple):
  """Blocks from `first` to `last`, of which all pairs from `inner` to `behind` are near."""

  first: Any
  inner: Any
  behind: Any
  last: Any

  @classmethod
  def of(cls, first, inner, behind, last):
    inner = jnp.clip(inner, first, last)
    return cls(first, inner, jnp.clip(behind, inner, last), last)


class _Queries(NamedTuple):
  """A block of queries of one row and head; past the end of the row, 0 is loaded."""

  row: Any
  head: Any
  span: Any
  index_C: jax.Array
  is_real_C: jax.Array
  first: Any

  @classmethod
  def of(cls, row, head, index, layout):
    block = layout.query_block
    first = index * block
    index_C = first + jax.lax.iota(jnp.int32, block)
    return cls(row, head, pl.ds(first, block), index_C, index_C < layout.time, first)

  def key_blocks(self, layout):
    """Blocks of keys within reach."""
    start, block = self.first + layout.offset, layout.key_block
    stop = start + layout.query_block
    return _Blocks.of(
      jnp.maximum(start - layout.window, 0) // block,
      pl.cdiv(jnp.maximum(stop - 1 - layout.window, 0), block),
      jnp.minimum(start + 1, layout.keys) // block,
      pl.cdiv(jnp.minimum(stop, layout.keys), block),
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
  """A block of keys of one row and key-value head; past the end of the row, 0 is loaded."""

  row: Any
  head: Any
  span: Any
  index_M: jax.Array
  is_real_M: jax.Array
  first: Any

  @classmethod
  def of(cls, row, head, index, layout):
    block = layout.key_block
    first = index * block
    index_M = first + jax.lax.iota(jnp.int32, block)
    return cls(row, head, pl.ds(first, block), index_M, index_M < layout.keys, first)

  def query_blocks(self, layout):
    """Blocks of queries that reach these keys; padding in the last one is zero and adds zero."""
    start, block = self.first - layout.offset, layout.query_block
    stop = start + layout.key_block
    return _Blocks.of(
      jnp.maximum(start, 0) // block,
      pl.cdiv(jnp.maximum(stop - 1, 0), block),
      jnp.maximum(start + layout.window + 1, 0) // block,
      pl.cdiv(jnp.clip(stop + layout.window, 0, layout.time), block),
    )

  def _mask(self, size):
    return jnp.broadcast_to(self.is_real_M[:, None], (self.is_real_M.shape[0], size))

  def load(self, ref):
    mask_MH = self._mask(ref.shape[3])
    return plgpu.load(ref.at[self.row, self.span, self.head, :], mask=mask_MH, other=0)

  def store(self, ref, group, x_MH):
    place, mask_MH = (self.row, group, self.span, self.head), self._mask(ref.shape[4])
    plgpu.store(ref.at[(*place, slice(None))], x_MH.astype(ref.dtype), mask=mask_MH)

  def load_documents(self, ref):
    return plgpu.load(ref.at[self.row, self.span], mask=self.is_real_M, other=0)
