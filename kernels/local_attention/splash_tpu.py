"""JAX's splash attention for TPU (jax.experimental.pallas.ops.tpu.splash_attention) for our op.

Letters of this file: Q and P are T and S padded to whole blocks, G the query heads of one key-value
head. The library's kernels visit the blocks of keys that the band reaches and no others; only the
logits of one block exist at a time, in VMEM. Padding comes after the last token, where causality
hides it. The library does not scale logits: q is scaled here, and rounded to its dtype once more
(exact where the root of H is a power of two). Several key-value heads are one more dimension of the
grid of the kernels for one.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# A vector register's lanes: the smallest block has so many rows, head sizes are multiples of it.
LANES = 128
# The size that public training configurations use for every block of these kernels, and halves of
# it for narrow windows: a block of queries meets window + block keys, a query sees window + 1.
_BLOCKS = (512, 256, LANES)


def attention(
  q_BTNH: jax.Array,
  k_BSEH: jax.Array,
  v_BSEH: jax.Array,
  q_documents_BT: jax.Array,
  k_documents_BS: jax.Array,
  *,
  window: int | None,
  interpret: bool = False,
) -> jax.Array:
  """As kernels/local_attention says, for head sizes that are multiples of 128.

  `interpret` runs the kernels without a TPU, slowly.
  """
  batch, time, heads, head_size = q_BTNH.shape
  keys, kv_heads = k_BSEH.shape[1:3]
  if head_size % LANES:
    raise ValueError(
      f"local_attention: head size {head_size} is no multiple of {LANES}, which splash_tpu needs"
    )
  blocks = (block_size(time, window), block_size(keys, window))
  filled = (_round_up(time, blocks[0]), _round_up(keys, blocks[1]))
  kernel = _kernel(filled, heads // kv_heads, window, keys - time, blocks, interpret)

  documents = splash.SegmentIds(
    _fill(q_documents_BT, filled[0], axis=1), _fill(k_documents_BS, filled[1], axis=1)
  )
  # Heads before time: a block of the kernels is of its last two dimensions, time and head size.
  q_BNTH = (q_BTNH * head_size**-0.5).astype(q_BTNH.dtype).swapaxes(1, 2)
  q_BNQH = _fill(q_BNTH, filled[0], axis=2)
  k_BEPH, v_BEPH = (_fill(x_BSEH.swapaxes(1, 2), filled[1], axis=2) for x_BSEH in (k_BSEH, v_BSEH))
  if kv_heads == 1:
    o_BNQH = jax.vmap(kernel)(q_BNQH, k_BEPH.squeeze(1), v_BEPH.squeeze(1), documents)
  else:
    q_BEGQH = q_BNQH.reshape(batch, kv_heads, heads // kv_heads, filled[0], head_size)
    of_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    o_BNQH = jax.vmap(of_row)(q_BEGQH, k_BEPH, v_BEPH, documents)
  # Without save_residuals the library returns the output alone.
  o_BNQH = cast(jax.Array, o_BNQH).reshape(q_BNQH.shape)
  return o_BNQH[:, :, :time].swapaxes(1, 2)


def block_size(length: int, window: int | None) -> int:
  """The largest block that fits into half a window and pads the length by at most an eighth."""
  limit = _BLOCKS[0] if window is None else window // 2
  fitting = [
    block for block in _BLOCKS if block <= limit and _round_up(length, block) <= 1.125 * length
  ]
  return fitting[0] if fitting else LANES


def visited_keys(length: int, window: int | None) -> float:
  """Keys in the blocks that a query's block is multiplied with, averaged over the row."""
  block = block_size(length, window)
  blocks = -(-length // block)
  firsts = (0 if window is None else max(0, (i * block - window) // block) for i in range(blocks))
  return block * sum(i - first + 1 for i, first in enumerate(firsts)) / blocks


def _round_up(length: int, block: int) -> int:
  return -(-length // block) * block


def _fill(x: jax.Array, length: int, *, axis: int) -> jax.Array:
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, padding)


class _Band(masks.LocalMask):
  """The library's band, which finds blocks wholly outside or inside the band by their corners.

  The library asks for every block of the T x S matrix. Computed entry by entry, the blocks of a row
  of 131,072 tokens would take minutes.
  """

  def __getitem__(self, idx) -> np.ndarray:
    q_rows, k_rows = idx
    window, _ = self.window_size
    # The smallest and the largest distance from query to key in the block.
    nearest = q_rows.start + self.offset - (k_rows.stop - 1)
    farthest = q_rows.stop - 1 + self.offset - k_rows.start
    if farthest < 0 or (window is not None and nearest > window):
      return np.zeros((1, 1), np.bool_)
    if nearest >= 0 and (window is None or farthest <= window):
      return np.ones((1, 1), np.bool_)
    return super().__getitem__(idx)


@functools.lru_cache(maxsize=64)
def _kernel(
  shape: tuple[int, int],
  heads: int,
  window: int | None,
  offset: int,
  blocks: tuple[int, int],
  interpret: bool,
) -> splash.SplashAttentionKernel:
  """The library's kernel and its schedule of blocks for one shape."""
  block_q, block_kv = blocks
  band = _Band(shape, (window, 0), offset)
  sizes = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  with jax.ensure_compile_time_eval():
    kernel = splash.make_splash_mqa_single_device(
      masks.MultiHeadMask([band] * heads),
      block_sizes=sizes,
      residual_checkpoint_name="attention",
      interpret=interpret,
    )
  # NumPy, to be a constant of any program that this is called from.
  return jax.tree.map(np.asarray, kernel)
