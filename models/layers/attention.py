"""Multi-query attention, local or global (arXiv:2402.19427, section 2.3).

A query sees itself and the `window` tokens before it, so at most window + 1 keys, all in its own
document; `window=None` is global attention, the baseline Transformer's. Distances are counted in
the row; rotary positions restart at each document.

Tensor parallelism: query heads and the rows of the output projection are split; the one key-value
head is computed on every shard, and its gradient is the sum over the shards' heads.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels import local_attention
from models.layers.rope import apply_rope
from models.layers.segments import NO_DOCUMENT, Segments
from models.param import normal, param, zeros
from sharding import logical


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """`window=None` is global; `implementation` names one of kernels/local_attention, or "auto"."""

  num_heads: int
  head_size: int
  window: int | None
  implementation: str = "auto"

  def __post_init__(self):
    for name in ("num_heads", "head_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"attention.Config: {name} {getattr(self, name)} must be at least 1")
    if self.head_size % 4:
      raise ValueError(
        f"attention.Config: head_size {self.head_size} must be a multiple of 4 (half of it is "
        "rotated, in pairs)"
      )
    if self.window is not None and self.window < 1:
      raise ValueError(f"attention.Config: window {self.window} must be at least 1, or None")

  def build(self, width: int, *, num_blocks: int, rngs: nnx.Rngs) -> "Attention":
    return Attention(self, width, num_blocks=num_blocks, rngs=rngs)


class AttentionState(NamedTuple):
  """The keys and values (rotated already) that later queries may see, newest last."""

  k_BWH: jax.Array
  v_BWH: jax.Array
  document_BW: jax.Array


class Attention(nnx.Module):
  """x -> attention over the documents of the row -> projection with bias."""

  def __init__(self, config: Config, width: int, *, num_blocks: int, rngs: nnx.Rngs):
    num_heads, head_size = config.num_heads, config.head_size
    self.window = config.window
    self.head_size = head_size
    self.implementation = local_attention.resolve(config.implementation)
    self.w_q_DNH = param(
      normal(1.0 / width), (width, num_heads, head_size), ("embed", "heads", "head"), rngs=rngs
    )
    self.w_kv_D2H = param(
      normal(1.0 / width), (width, 2, head_size), ("embed", "branch", "head"), rngs=rngs
    )
    self.w_out_NHD = param(
      normal(2.0 / (num_blocks * num_heads * head_size)),
      (num_heads, head_size, width),
      ("heads", "head", "embed"),
      rngs=rngs,
    )
    self.b_out_D = param(zeros, (width,), ("norm",), rngs=rngs)

  def initial_state(self, batch: int, context: int, dtype: jnp.dtype) -> AttentionState:
    """Room for `window` tokens, or for `context` tokens where attention is global."""
    size = context if self.window is None else self.window
    empty_BWH = jnp.zeros((batch, size, self.head_size), dtype)
    return AttentionState(empty_BWH, empty_BWH, jnp.full((batch, size), NO_DOCUMENT, jnp.int32))

  def __call__(
    self, x_BTD: jax.Array, segments: Segments, state: AttentionState | None
  ) -> tuple[jax.Array, AttentionState | None]:
    dtype = x_BTD.dtype
    with jax.named_scope("attention"):
      q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.w_q_DNH[...].astype(dtype))
      kv_BT2H = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.w_kv_D2H[...].astype(dtype))
      q_BTNH = apply_rope(q_BTNH, segments.position_BT)
      k_BSH = apply_rope(kv_BT2H[:, :, :1], segments.position_BT)[:, :, 0]
      v_BSH = kv_BT2H[:, :, 1]
      document_BS = segments.document_BT
      if state is not None:
        size = state.k_BWH.shape[1]
        k_BSH = jnp.concatenate([state.k_BWH, k_BSH], axis=1)
        v_BSH = jnp.concatenate([state.v_BWH, v_BSH], axis=1)
        document_BS = jnp.concatenate([state.document_BW, document_BS], axis=1)
        state = AttentionState(k_BSH[:, -size:], v_BSH[:, -size:], document_BS[:, -size:])
      # Split by heads here, the gradients of the one key and value are summed over the shards once;
      # left to the partitioner they are summed block by block, in float32.
      attend = logical.on_shards(
        functools.partial(
          local_attention.local_attention, window=self.window, implementation=self.implementation
        ),
        in_axes=(
          ("batch", "time", "heads", "head"),
          ("batch", "time", "head"),
          ("batch", "time", "head"),
          ("batch", "time"),
          ("batch", "time"),
        ),
        out_axes=("batch", "time", "heads", "head"),
      )
      y_BTNH = attend(q_BTNH, k_BSH, v_BSH, segments.document_BT, document_BS)
      y_BTD = jnp.einsum("BTNH,NHD->BTD", y_BTNH, self.w_out_NHD[...].astype(dtype))
      return y_BTD + self.b_out_D[...].astype(dtype), state
