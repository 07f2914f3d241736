"""What attention costs (models/costs.py), from the sizes and the kernel of its config."""

import math

from kernels.local_attention import splash_tpu
from models.costs import FlopsPart, KernelPass, LayerActivations, Sends, Sent, Shard

SCOPES = ("attention",)

_FLOAT32 = _INT32 = 4
# Implementations that write logits to HBM.
_UNFUSED = ("reference", "banded")
# Shares of the 2 products of the forward pass. The rates of backward kernels (sharding/topology.py)
# count 5 products in all; the kernels form 7, and each counts its part of the 5.
_KEYS, _QUERIES = 5 * 4 / 7 / 2, 5 * 3 / 7 / 2
_KERNELS = (
  KernelPass("splash_mqa_fwd", 1.0, is_backward=False),
  KernelPass("splash_mqa_dkv", _KEYS, is_backward=True),
  KernelPass("splash_mqa_dq", _QUERIES, is_backward=True),
  KernelPass("local_attention_forward", 1.0, is_backward=False),
  KernelPass("local_attention_backward_keys", _KEYS, is_backward=True),
  KernelPass("local_attention_backward_queries", _QUERIES, is_backward=True),
)


def flops(
  width: int,
  row_length: int,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_size: int,
  window: int | None,
  implementation: str,
) -> tuple[FlopsPart, ...]:
  """Projections, and products with the keys that a query sees. Splash also multiplies the rest of
  the blocks of keys that it visits; rates on GPUs count only the keys that queries see."""
  heads_width = num_heads * head_size
  each_key = 4.0 * heads_width  # q k^T and p v
  visited = None
  if implementation == "splash_tpu":
    visited = each_key * splash_tpu.visited_keys(row_length, window)
  return (
    FlopsPart(
      name="attention_matmul",
      words="attention, projections",
      flops=2.0 * width * (2 * heads_width + 2 * num_kv_heads * head_size),
      last=2.0 * width * heads_width,
    ),
    FlopsPart(
      name="attention_keys",
      words="attention, keys",
      flops=each_key * visible_keys(row_length, window),
      kind="attention",
      multiplied=visited,
      kernels=_KERNELS,
      scope="attention",
    ),
  )


def visible_keys(row_length: int, window: int | None) -> float:
  """Keys that a query sees, itself included, averaged over the row."""
  if window is None or window + 1 >= row_length:
    return (row_length + 1) / 2
  ramp = window * (window + 1) / 2
  return (ramp + (row_length - window) * (window + 1)) / row_length


def activations(
  width: int,
  shard: Shard,
  *,
  num_heads: int,
  num_kv_heads: int,
  head_size: int,
  window: int | None,
  implementation: str,
) -> LayerActivations:
  """q: D -> N H; k and v: D -> 2 E H; rotation: N H -> N H; attention: N H -> N H; out: N H -> D.

  Unfused, logits of the keys in reach are written and read in float32, and their softmax in the
  dtype of activations. For global attention, a shard of a row holds the keys and values of the
  whole row, and their gradients.
  """
  a, heads = shard.itemsize, num_heads * head_size / shard.tensor
  keys_values = 2 * _kv_heads_of(shard, num_kv_heads) * head_size
  reach = shard.row_length if window is None else min(shard.row_length, window + 128)
  logits = 0.0
  if implementation in _UNFUSED:
    logits = num_heads / shard.tensor * reach * (2 * _FLOAT32 + 2 * a)
  gathered = keys_values * shard.sequence if window is None and shard.sequence > 1 else 0
  elementwise = a * 2 * heads + a * 2 * heads + logits
  return LayerActivations(
    products=a * (heads + keys_values + width),
    batched=a * heads,
    forward=a * (3 * width + 2 * heads + keys_values) + elementwise,
    elementwise=elementwise,
    working=a * (4 * heads + 2 * gathered),
  )


def _kv_heads_of(shard: Shard, num_kv_heads: int) -> int:
  """How many key-value heads a shard of heads computes; a shared one counts in each shard."""
  return math.lcm(num_kv_heads, shard.tensor) // shard.tensor


def sends(shard: Shard, *, num_kv_heads: int, head_size: int, window: int | None) -> Sends:
  """Documents once; for each layer, keys and values forward and again, and their gradients."""
  size = _kv_heads_of(shard, num_kv_heads) * head_size * shard.itemsize
  if window is None:
    tokens = shard.rows * shard.row_length
    return Sends(
      once=(Sent("all-gather", "sequence", 1, tokens * _INT32),),
      each=(
        Sent("all-gather", "sequence", 4, 4 * tokens * size),
        Sent("reduce-scatter", "sequence", 2, 2 * tokens * size),
      ),
    )
  # From as many shards before this one as a window covers.
  time = shard.row_length // shard.sequence
  reached = min(window, (shard.sequence - 1) * time)
  shards = math.ceil(reached / time)
  return Sends(
    once=(Sent("collective-permute", "sequence", shards, shard.rows * reached * _INT32),),
    each=(Sent("collective-permute", "sequence", 6 * shards, 6 * shard.rows * reached * size),),
  )
